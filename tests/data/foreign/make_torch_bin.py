"""pytorch_model.bin by transformers 4.56 in one file, in shards and tied; run with its interpreter in this directory.

Beside each lies the same state dict as safetensors, written by the safetensors library.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

CONFIG = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": 8,
}  # fmt: skip


def make(name, **options):
    tied = options.pop("tied", False)
    random = np.random.default_rng(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG, tie_word_embeddings=tied)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape), np.float32)))
    directory = Path(__file__).parent / "torch-bin" / name
    model.save_pretrained(directory, safe_serialization=False, **options)
    (directory / "generation_config.json").unlink()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, directory / "beside.safetensors", {"format": "pt"})


make("single")
make("shards", max_shard_size="6KB")
make("tied", tied=True)
