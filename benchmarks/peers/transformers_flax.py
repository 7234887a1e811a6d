"""transformers 4's Flax Mistral, float32, generate under one jax.jit: called plainly, it compiles at every call."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import transformers

from benchmarks.common import differenced, prompt_ids, say, task


def main() -> None:
    asked = task()
    never = asked["sizes"]["vocab_size"]  # an end of sequence must be given, and no token is this one
    config = transformers.MistralConfig(**asked["sizes"], eos_token_id=never, pad_token_id=0)
    model = transformers.FlaxMistralForCausalLM(config, seed=0)
    ids = jnp.asarray(prompt_ids(asked), jnp.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def program(params: Any, ids_BT: Any, new: int) -> Any:
        return model.generate(
            ids_BT, attention_mask=jnp.ones_like(ids_BT), params=params, max_new_tokens=new, do_sample=False
        ).sequences

    def generate(new: int) -> None:
        program(model.params, ids, new).block_until_ready()

    say(differenced(generate, asked["new"], asked["calls"]), "transformers", "jax")


if __name__ == "__main__":
    main()
