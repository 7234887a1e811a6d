"""transformers' torch Mistral; option: static, its compiled static cache instead of the default cache, eager."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from benchmarks.common import prompt_ids, random_weights, say, streamed, task


def made(asked: dict[str, Any]) -> Any:
    """A model in evaluation, SDPA attention, its weights made in place."""
    import numpy as np

    dtype = getattr(torch, asked["dtype"])
    config = transformers.MistralConfig(**asked["sizes"], eos_token_id=None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rotary = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(config)  # its buffers have values
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                array = random_weights(tuple(parameter.shape), asked["dtype"], rng)
                parameter.copy_(torch.from_numpy(array).view(dtype))
    return model.eval()


def main() -> None:
    asked = task()
    model = made(asked)
    ids = torch.from_numpy(prompt_ids(asked))
    options: dict[str, Any] = {}
    if asked["options"].get("static"):
        compiling = transformers.CompileConfig(fullgraph=False, mode="default")
        compiling._compile_all_devices = True  # its own way to compile on a CPU
        options = {"cache_implementation": "static", "compile_config": compiling}

    def generate(streamer: Any) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=asked["new"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=streamer,
            **options,
        )

    say(streamed(generate, asked["calls"]), "transformers", "torch")


if __name__ == "__main__":
    main()
