"""Train and generate in JAX over eight devices: weights cut over fsdp and tensor; a CPU plays all eight.

Prints:

    each device holds an eighth of q_proj: True
    the last loss is below a tenth of the first: True
    Emma was reading about attention masks.
"""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"  # before JAX

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_flax import MistralForCausalLM, MistralTokenizer

TEXTS = ["Emma was reading about attention masks.", "It rained."]


def main() -> None:
    """Load, train and ask a model that no device holds alone."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    tokenizer = MistralTokenizer.from_pretrained(path)
    model = MistralForCausalLM.from_pretrained(path, dtype="float32", mesh=mesh)
    q_proj = model.params["model.layers.0.self_attn.q_proj.weight"]
    print("each device holds an eighth of q_proj:", q_proj.addressable_data(0).size == q_proj.size // 8)

    batch = dict(tokenizer(TEXTS * 2, padding=True, return_tensors="np"))
    labels = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)  # padding is not learnt

    @nnx.jit
    def step(model: MistralForCausalLM, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda model: model(**batch, labels=labels, use_cache=False).loss)(model)
        optimizer.update(model, gradients)  # moments and gradients are cut as the weights
        return value

    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    losses = [float(step(model, optimizer)) for _ in range(40)]
    print("the last loss is below a tenth of the first:", losses[-1] < losses[0] / 10)

    out = model.generate([tokenizer.encode("Emma was")], max_new_tokens=9)
    print(tokenizer.decode(out[0].tolist(), skip_special_tokens=True))
    model.save_pretrained("trained")


if __name__ == "__main__":
    main()
