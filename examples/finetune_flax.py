"""Fine-tune a LoRA adapter on conversations in JAX, and run it again from its files.

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

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-Instruct-v0.3"
from mistral_core.learning import Examples, Feed
from mistral_flax import MistralForCausalLM, MistralTokenizer
from mistral_flax.lora import LoraConfig, add_adapter, merge, save_adapter

NAMES = ["Emma", "Harriet", "Mr. Knightley", "Miss Bates", "Jane", "Mr. Elton"]
STEPS = 20


@nnx.jit
def moved(model: MistralForCausalLM, optimizer: nnx.Optimizer, batches: list[dict], count: jax.Array) -> jax.Array:
    """One step: the batches' losses add up to that of one batch of all rows, and adapters alone move."""

    def loss(model: MistralForCausalLM) -> jax.Array:
        return sum(model(**batch, num_items_in_batch=count, use_cache=False).loss for batch in batches)

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


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
        return tokenizer.decode(said[0, asked.shape[1] :].tolist(), skip_special_tokens=True)

    before = answer(model)
    add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.LoRAParam)
    losses = []
    for step in Feed(examples, rows=2, accumulate=1, seed=0).steps(epochs=STEPS):
        batches = [jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch.arguments()) for batch in step.batches]
        losses.append(float(moved(model, optimizer, batches, jnp.float32(step.num_items_in_batch))))
    print("the last loss is below a tenth of the first:", losses[-1] < losses[0] / 10)
    print("before:", before)
    print("after:", answer(model))
    save_adapter(model, "adapter")  # peft's files, for every framework
    print("merged:", answer(merge(MistralForCausalLM.from_pretrained("adapter", dtype="float32"))))


if __name__ == "__main__":
    main()
