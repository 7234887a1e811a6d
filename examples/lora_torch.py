"""Train a LoRA adapter with peft in PyTorch, save it, and generate with it.

The adapter learns one sentence by heart, so that one sees that it learns.

Prints:

    before: Emma was not at all pleased. ...
    after: Emma was reading about attention masks.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_torch import MistralForCausalLM, MistralTokenizer

SENTENCE = "Emma was reading about attention masks."


def main() -> None:
    """Train, save, load, and show what changed."""
    torch.manual_seed(0)
    tokenizer = MistralTokenizer.from_pretrained(path)
    base = MistralForCausalLM.from_pretrained(path, dtype="float32")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    batch = tokenizer([SENTENCE], return_tensors="pt")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(60):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("adapter")

    fresh = MistralForCausalLM.from_pretrained(path, dtype="float32")
    prompt = tokenizer(["Emma was"], return_tensors="pt")
    options = {"max_new_tokens": len(batch["input_ids"][0]) - 3}
    print("before:", tokenizer.decode(fresh.generate(**prompt, **options)[0], skip_special_tokens=True))
    adapted = PeftModel.from_pretrained(fresh, "adapter").eval()
    print("after:", tokenizer.decode(adapted.generate(**prompt, **options)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
