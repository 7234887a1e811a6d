"""transformers 4's TensorFlow Mistral, float32; option: xla, generate in a tf.function compiled by XLA."""

from __future__ import annotations

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

from typing import Any

import tensorflow as tf
import transformers

from benchmarks.common import differenced, prompt_ids, say, task


def main() -> None:
    asked = task()
    config = transformers.MistralConfig(**asked["sizes"], eos_token_id=None, pad_token_id=0)
    model = transformers.TFMistralForCausalLM(config)
    ids = tf.constant(prompt_ids(asked), tf.int32)
    mask = tf.ones_like(ids)
    programs: dict[int, Any] = {}

    def generate(new: int) -> None:
        def plain() -> Any:
            return model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
            )

        if new not in programs:
            programs[new] = tf.function(plain, jit_compile=True) if asked["options"].get("xla") else plain
        programs[new]().numpy()

    say(differenced(generate, asked["new"], asked["calls"]), "transformers", "tensorflow")


if __name__ == "__main__":
    main()
