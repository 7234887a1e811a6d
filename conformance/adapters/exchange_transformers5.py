"""transformers 5 loads and saves Hugging Face safetensors; run by its own interpreter, see conformance/exchange.py."""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM


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


def run(framework, path, texts, out):
    """The prompts' and the likeliest tokens, as a user asks for them."""
    with open(texts, encoding="utf-8") as file:
        given = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    for text in given["texts"]:
        inputs = tokenizer(text, return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=given["new"], do_sample=False)[0].tolist()
        rows.append(found)
    with open(out, "w", encoding="utf-8") as file:
        json.dump(rows, file)


if __name__ == "__main__":
    {"read": read, "write": write, "run": run}[sys.argv[1]](*sys.argv[2:])
