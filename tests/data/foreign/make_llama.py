"""LLaMAs that are Mistrals, by transformers 5.23, with their logits; run with its interpreter in this directory."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def make(name, **fields):
    random = np.random.default_rng(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            values = random.standard_normal(tuple(parameter.shape), np.float32)
            parameter.copy_(torch.from_numpy(values if parameter.ndim == 2 else 1 + values / 10))
        logits = model(torch.tensor([[1, 7, 40, 2, 33, 9, 21, 5]])).logits
    directory = Path(__file__).parent / "llama" / name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.save(directory / "logits.npy", logits.numpy())


make("plain")
make("scaled-tied", rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=8, rms_norm_eps=1e-5)
