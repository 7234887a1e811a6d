"""A loss, a prompt or a training step over one long text of our own, in any backend.

Options: backend, what (score, prefill, train, attend), layout (plain, padded, packed), rows.
"""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import peak_memory, say, task, timed
from benchmarks.peers.ours import FRAMEWORKS
from mistral_core import MistralConfig

PREFILL = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
REPEATED = 8192
"""The longest text whose time is the median of three calls."""


def inputs(layout: str, *, rows: int, tokens: int, window: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Ids, and what says how they are laid out."""
    ids = np.random.default_rng(0).integers(3, vocabulary, (rows, tokens // rows))
    if layout == "padded":
        mask = np.ones_like(ids)
        mask[0, : tokens // 16] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if layout == "packed":
        return {"input_ids": ids, "document_ids": (np.arange(tokens) // (window * 5 // 8))[None]}
    return {"input_ids": ids}


def attending(config: MistralConfig, asked: dict[str, Any], given: dict[str, Any], compiled: Any) -> Callable[[], Any]:
    """The attention of one layer alone, as it is by default."""
    array = importlib.import_module(f"mistral_{asked['backend']}.arrays").from_numpy
    attention = importlib.import_module(f"mistral_{asked['backend']}.attention")
    rows, tokens = given["input_ids"].shape
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    rng = np.random.default_rng(0)
    numbers = [
        rng.standard_normal((rows, tokens, n, config.head_dim), np.float32).astype(asked["dtype"]) for n in heads
    ]
    implementation = attention.check_implementation(None)
    options = {"in_c": True} if asked["backend"] == "torch" else {}  # JAX and TensorFlow ask by themselves

    def attend(order_BT: Any, *arrays: Any) -> Any:
        visibility = attention.Visibility(order_BT, order_BT, config.sliding_window, **options)
        visibility = attention.prepared(visibility, implementation)
        return attention.attend(*arrays, visibility, implementation=implementation)[0]

    program, arguments = compiled(attend), [array(np.arange(tokens, dtype=np.int32)[None]), *map(array, numbers)]
    return lambda: program(*arguments)


def call_torch(config: MistralConfig, asked: dict[str, Any], given: dict[str, Any]) -> Callable[[], Any]:
    """What is measured, in PyTorch as it comes."""
    import torch

    from mistral_torch import MistralForCausalLM

    if asked["what"] == "attend":
        return torch.no_grad()(attending(config, asked, given, lambda function: function))
    model = MistralForCausalLM(config).to(getattr(torch, asked["dtype"]))
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    if asked["what"] == "prefill":
        return lambda: model.eval().generate(**tensors, **PREFILL)
    if asked["what"] == "score":
        model.eval()

        def score() -> Any:
            with torch.no_grad():
                return float(model(**tensors, labels=tensors["input_ids"]).loss)

        return score
    model.train().gradient_checkpointing_enable()

    def train() -> Any:
        model.zero_grad()
        model(**tensors, labels=tensors["input_ids"]).loss.backward()

    return train


def call_flax(config: MistralConfig, asked: dict[str, Any], given: dict[str, Any]) -> Callable[[], Any]:
    """What is measured, as a program of JAX."""
    import jax

    from mistral_flax import MistralForCausalLM

    if asked["what"] == "attend":
        call = attending(config, asked, given, jax.jit)
        return lambda: jax.block_until_ready(call())
    model = MistralForCausalLM(config, dtype=asked["dtype"])
    if asked["what"] == "prefill":
        return lambda: model.generate(**given, **PREFILL)
    if asked["what"] == "train":
        model.gradient_checkpointing_enable()
    arrays = {name: jax.numpy.asarray(array) for name, array in given.items()}

    def loss(params: Any, arrays: Any) -> Any:
        return model(**arrays, params=params, labels=arrays["input_ids"], use_cache=False).loss

    program = jax.jit(jax.value_and_grad(loss) if asked["what"] == "train" else loss)
    return lambda: jax.block_until_ready(program(model.params, arrays))


def call_tf(config: MistralConfig, asked: dict[str, Any], given: dict[str, Any]) -> Callable[[], Any]:
    """What is measured, as a graph of TensorFlow."""
    import tensorflow as tf

    from mistral_tf import MistralForCausalLM

    if asked["what"] == "attend":
        call = attending(config, asked, given, tf.function)
        return lambda: call().numpy()
    model = MistralForCausalLM(config, dtype=asked["dtype"])
    if asked["what"] == "prefill":
        return lambda: model.generate(**given, **PREFILL)
    if asked["what"] == "train":
        model.gradient_checkpointing_enable()
    tensors = {name: tf.constant(array, tf.int32) for name, array in given.items()}

    @tf.function
    def score(tensors: Any) -> Any:
        return model(**tensors, labels=tensors["input_ids"], use_cache=False, training=False).loss

    @tf.function
    def train(tensors: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model(**tensors, labels=tensors["input_ids"], use_cache=False, training=True).loss
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    program = train if asked["what"] == "train" else score
    return lambda: [
        np.asarray(x.values if hasattr(x, "values") else x).ravel()[0] for x in tf.nest.flatten(program(tensors))
    ]


CALLS = {"torch": call_torch, "flax": call_flax, "tf": call_tf}


def main() -> None:
    asked = task()
    options, tokens, config = asked["options"], asked["tokens"], MistralConfig(**asked["sizes"])
    sizes = {"rows": options["rows"], "tokens": tokens, "window": asked["window"], "vocabulary": config.vocab_size}
    given = inputs(options["layout"], **sizes)
    call = CALLS[options["backend"]](config, {**options, "dtype": asked["dtype"]}, given)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    call()
    seconds = statistics.median(timed(call) for _ in range(3 if tokens <= REPEATED else 1))
    say({"seconds": seconds, "peak": peak_memory() - before}, FRAMEWORKS[options["backend"]])


if __name__ == "__main__":
    main()
