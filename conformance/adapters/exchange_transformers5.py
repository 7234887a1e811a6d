"""transformers 5 loads and saves Hugging Face safetensors; run by its own interpreter, see conformance/exchange.py."""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version

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


def run(framework, job, out):
    """The prompts' and the likeliest tokens of each directory, and the logits they follow from."""
    with open(f"{out}/versions.json", "w", encoding="utf-8") as file:
        json.dump({package: version(package) for package in ("transformers", "torch")}, file)
    with open(job, encoding="utf-8") as file:
        given = json.load(file)
    for key, path in given["folders"].items():
        try:
            found = generated(path, given["texts"], given["new"])
        except Exception as error:  # one that does not load says nothing of the others
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        np.savez(f"{out}/{key}.npz", **found)


def generated(path, texts, new):
    """Tokens and logits of each text, as a user asks for them."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), {}
    for at, text in enumerate(texts):
        inputs = tokenizer(text, return_tensors="pt")
        found[f"tokens:{at}"] = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0].numpy()
        with torch.no_grad():
            found[f"logits:{at}"] = model(**inputs).logits[0, -1].numpy()
    return found


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"read": read, "write": write, "run": run}
    commands[sys.argv[1]](*sys.argv[2:])
