"""Fine-tune a LoRA adapter on conversations with Keras' fit, and run it again from its files.

Only what the assistant says is learnt; several conversations are packed into a row, and none of them sees another.

Prints:

    6 examples, 190 tokens, 53 of them learnt; 0 cut, 0 tokens lost; 0 dropped, with nothing left to learn
    the last loss is below a tenth of the first: True
    before: ...
    after: Emma is of Highbury.
    merged: Emma is of Highbury.
"""

from __future__ import annotations

import json
from pathlib import Path

import keras

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-Instruct-v0.3"
from mistral_core.learning import Examples, Feed
from mistral_tf import MistralForCausalLM, MistralTokenizer
from mistral_tf.lora import LoraConfig, add_adapter, merge, save_adapter
from mistral_tf.optimizers import AdamW

NAMES = ["Emma", "Harriet", "Mr. Knightley", "Miss Bates", "Jane", "Mr. Elton"]
STEPS = 20


def main() -> None:
    """Write conversations, train an adapter on them, and ask the model before and after."""
    chats = [
        [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"{name} is of Highbury."}]
        for name in NAMES
    ]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tokenizer = MistralTokenizer.from_pretrained(path, version="v1")
    examples = Examples("chats.jsonl", tokenizer, length=128)
    print(examples.counts())

    model = MistralForCausalLM.from_pretrained(path, dtype="float32")
    asked = tokenizer.apply_chat_template(chats[0][:1], return_tensors="np")

    def answer(model: MistralForCausalLM) -> str:
        said = model.generate(asked, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(said[0, asked.shape[1] :].numpy(), skip_special_tokens=True)

    before = answer(model)
    add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, STEPS)
    model.compile(AdamW(rate, weight_decay=0.0, global_clipnorm=1.0))  # the loss is the model's own, of its adapters
    steps = Feed(examples, rows=2, accumulate=1, seed=0).steps(epochs=STEPS)
    batches = ((batch.arguments(),) for step in steps for batch in step.batches)
    losses = model.fit(batches, epochs=STEPS, steps_per_epoch=1, shuffle=False, verbose=0).history["loss"]
    print("the last loss is below a tenth of the first:", losses[-1] < losses[0] / 10)
    print("before:", before)
    print("after:", answer(model))
    save_adapter(model, "adapter")  # peft's files, for every framework
    print("merged:", answer(merge(MistralForCausalLM.from_pretrained("adapter", dtype="float32"))))


if __name__ == "__main__":
    main()
