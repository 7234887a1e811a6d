"""keras-hub's Mistral, generate compiled and never stopping; options: backend, jax or tensorflow, and jit_compile.

Its prefill runs over the whole length, prompt and room, and the first token is a step of its own after it. So a step
is the difference between a prompt that leaves room for all new tokens and one that leaves room for one, at the same
length; time to first token is taken at the length that it needs.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import numpy as np

from benchmarks.common import peak_memory, prompt_ids, say, task, timed


def made(asked: dict[str, Any]) -> Any:
    """A compiled model with random weights of its own."""
    import keras
    import keras_hub

    sizes = asked["sizes"]
    keras.config.set_dtype_policy(asked["dtype"])
    backbone = keras_hub.models.MistralBackbone(
        vocabulary_size=sizes["vocab_size"],
        num_layers=sizes["num_hidden_layers"],
        num_query_heads=sizes["num_attention_heads"],
        hidden_dim=sizes["hidden_size"],
        intermediate_dim=sizes["intermediate_size"],
        num_key_value_heads=sizes["num_key_value_heads"],
        sliding_window=sizes["sliding_window"],
        dtype=asked["dtype"],
    )
    model = keras_hub.models.MistralCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy", jit_compile=asked["options"].get("jit_compile", "auto"))
    return model


def main() -> None:
    asked = task()
    backend = os.environ["KERAS_BACKEND"] = asked["options"]["backend"]
    model = made(asked)
    prompt, new, ids = asked["prompt"], asked["new"], prompt_ids(asked)

    def generate(given: int, room: int) -> None:
        tokens = np.resize(ids, (asked["batch"], given + room)).astype(np.int32)
        mask = np.broadcast_to(np.arange(given + room) < given, tokens.shape)
        model.generate({"token_ids": tokens, "padding_mask": np.array(mask)}, stop_token_ids=None)

    kinds = {"all": (prompt, new), "last": (prompt + new - 1, 1), "first": (prompt, 1)}
    cold = {kind: timed(generate, *lengths) for kind, lengths in kinds.items()}
    runs = [{kind: timed(generate, *lengths) for kind, lengths in kinds.items()} for _ in range(asked["calls"])]
    seconds = {kind: statistics.median(run[kind] for run in runs) for kind in kinds}
    result = {
        "first": seconds["first"],
        "step": (seconds["all"] - seconds["last"]) / (new - 1),
        "compile": cold["all"] - seconds["all"],
        "peak": peak_memory(),
    }
    say(result, "keras-hub", backend)


if __name__ == "__main__":
    main()
