"""Fine-tune over processes in PyTorch, layers cut over two of them and the batch over the others; then generate.

    torchrun --nproc-per-node 4 examples/torchrun_fsdp.py

Also one process, or two, take the same steps: a loss is a sum over labels, divided by the labels of all processes.

Prints:

    before: Emma was not at all pleased. ...
    after: Emma was reading about attention masks.
"""

from __future__ import annotations

import os

import torch
from torch.distributed import destroy_process_group, init_device_mesh

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_torch import MistralForCausalLM, MistralTokenizer
from mistral_torch.sharding import average

SENTENCE = "Emma was reading about attention masks."
ROWS = [SENTENCE, SENTENCE[:22], SENTENCE[:18], SENTENCE]  # of unequal numbers of labels


def main() -> None:
    """Load each process's part, train, generate, and save from all parts."""
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(name, alone)  # torchrun sets them
    tensor = 2 - int(os.environ["WORLD_SIZE"]) % 2
    sizes = int(os.environ["WORLD_SIZE"]) // tensor, tensor
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("fsdp", "tensor"))  # or "cuda"
    tokenizer = MistralTokenizer.from_pretrained(path)
    model = MistralForCausalLM.from_pretrained(path, dtype="float32", mesh=mesh)
    prompt = tokenizer(["Emma was"], return_tensors="pt")
    new = len(tokenizer(SENTENCE).input_ids) - 3
    before = model.generate(**prompt, max_new_tokens=new)
    mine = ROWS[mesh["fsdp"].get_local_rank() :: mesh["fsdp"].size()]  # each tensor group has the same rows
    batch = tokenizer(mine, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    count = average((labels[:, 1:] != -100).sum(), mesh)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(12):
        model(**batch, labels=labels, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = model.eval().generate(**prompt, max_new_tokens=new)
    model.save_pretrained("tuned")  # all call it, the first one writes
    if not any(mesh.get_coordinate()):
        print("before:", tokenizer.decode(before[0], skip_special_tokens=True))
        print("after:", tokenizer.decode(after[0], skip_special_tokens=True))
    destroy_process_group()


if __name__ == "__main__":
    main()
