"""transformers 5 loads and saves Hugging Face safetensors; run by its own interpreter, see conformance/exchange.py."""

import json
import sys

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM


def read(format, path, ids, out):
    model = MistralForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))).logits.numpy()
    tensors = {f"tensor:{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(out, logits=logits, **tensors)


def write(format, weights, config, out):
    with open(config) as file:
        fields = json.load(file)
    model = MistralForCausalLM(MistralConfig(**fields))
    with np.load(weights) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files}, strict=True)
    model.save_pretrained(out, max_shard_size="50KB")


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
