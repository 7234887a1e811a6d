"""The price of long texts: time a token and peak memory from one window of text to many, in every framework.

    python -m benchmarks.long_texts [--backend torch,flax,tf] [--what score,prefill,train]
        [--layout plain,padded,packed] [--windows 1,2,4,8,16,32]
        [--window 1024] [--dtype float32] [--rounds 1] [--full] [--write]

Scoring is a loss without gradients, prefill `generate` of one token, training a loss and all gradients with gradient
checkpointing. Padded is two rows of which the first begins late; packed are documents of five eighths of a window.
Each point is a process of its own: its second call is timed, its peak is what it takes beyond the model. Flat is a
token's time of at most 1.15 times that at 4 windows. `--full` takes the same texts without a window, which cost more
with every token, and says how many times as long they take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mistral_core import MistralConfig

from .common import (
    POLITE,
    ROOT,
    keep,
    listed,
    machine,
    peak_memory,
    report,
    say,
    shown,
    table_row,
    timed,
    versions,
)

CONFIG = MistralConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    intermediate_size=1408, vocab_size=5120, max_position_embeddings=1 << 20,
)  # fmt: skip
"""A vocabulary that is no number of tokens: where it is, XLA for CPUs lays the logits out the wrong way round."""
BASE = 4
"""Windows of text from which on a token must cost the same."""
FLAT = 1.15
PACKAGES = {"torch": ("torch",), "flax": ("jax", "flax"), "tf": ("tensorflow", "keras")}

# In the child


def inputs(layout: str, tokens: int, window: int) -> dict[str, np.ndarray]:
    """Ids, and what says how they are laid out."""
    rows = 2 if layout == "padded" else 1
    ids = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (rows, tokens // rows))
    if layout == "padded":
        mask = np.ones_like(ids)
        mask[0, : tokens // 16] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if layout == "packed":
        return {"input_ids": ids, "document_ids": (np.arange(tokens) // (window * 5 // 8))[None]}
    return {"input_ids": ids}


def call_torch(config: MistralConfig, asked: dict[str, Any], given: dict[str, Any]) -> Callable[[], Any]:
    """What is measured, in PyTorch as it comes."""
    import torch

    from mistral_torch import MistralForCausalLM

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


PREFILL = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
CALLS = {"torch": call_torch, "flax": call_flax, "tf": call_tf}


def child(asked: dict[str, Any]) -> None:
    """Measure one point in this process and say what was found."""
    window = asked["window"]
    config = CONFIG.replace(sliding_window=None if asked["full"] else window)
    given = inputs(asked["layout"], asked["tokens"], window)
    call = CALLS[asked["backend"]](config, asked, given)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    call()
    seconds = statistics.median(timed(call) for _ in range(3 if asked["tokens"] <= 8 * window else 1))
    say({"seconds": seconds, "peak": peak_memory() - before}, *PACKAGES[asked["backend"]])


# In the parent


def measured(asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a fresh process found; None where it failed."""
    report(", ".join(f"{name} {value}" for name, value in asked.items()))
    command = [sys.executable, "-m", "benchmarks.long_texts", "--child", json.dumps(asked)]
    environment = {**os.environ, **POLITE, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        report("failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
        return None
    return json.loads(lines[-1])


def main() -> int:
    """Measure, print, and with --write keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--what", type=listed, default=["score", "prefill", "train"])
    parser.add_argument("--layout", type=listed, default=["plain", "padded", "packed"])
    parser.add_argument("--windows", type=listed, default=["1", "2", "4", "8", "16", "32"])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="without a window too")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/long_texts.md")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return 0
    windows = [int(text) for text in arguments.windows]
    kinds = [
        (*kind, full)
        for kind in itertools.product(arguments.backend, arguments.what, arguments.layout)
        for full in ((False, True) if arguments.full else (False,))
        if kind[1:] != ("prefill", "packed")  # a prompt is one text
    ]
    found: dict[Any, list[Any]] = {}
    for _, kind, count in itertools.product(range(arguments.rounds), kinds, windows):
        backend, what, layout, full = kind
        asked = {
            "backend": backend, "what": what, "layout": layout, "full": full, "tokens": count * arguments.window,
            "window": arguments.window, "dtype": arguments.dtype,
        }  # fmt: skip
        found.setdefault((*kind, count), []).append(measured(asked))
    page, flat = table(arguments, kinds, windows, found)
    print(page)
    if arguments.write:
        keep("long_texts.md", page)
    return 0 if flat else 1


def table(
    arguments: argparse.Namespace, kinds: list[Any], windows: list[int], found: dict[Any, list[Any]]
) -> tuple[str, bool]:
    """The page, and whether every windowed text is flat."""
    head = ["", "", *(f"{count * arguments.window} tokens" for count in windows), "most / first from 4 windows on"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    flat = True
    for kind in kinds:
        backend, what, layout, full = kind
        name = f"{backend}, {what}, {layout}" + (", no window" if full else "")
        for key, unit in (("seconds", "us a token"), ("peak", "bytes a token")):
            values = []
            for count in windows:
                results = [each for each in found[*kind, count] if each]
                tokens = count * arguments.window
                each = statistics.median(r[key] for r in results) / tokens if results else None
                values.append(each if each is None or key == "peak" else 1e6 * each)
            later = [v for v, count in zip(values, windows, strict=True) if count >= BASE and v]
            ratio = max(later) / later[0] if later else None
            if key == "seconds" and not full:
                flat &= ratio is not None and ratio <= FLAT and None not in values
            cells = ["failed" if v is None else shown(float(v)) for v in values]
            lines.append(table_row([name, unit, *cells, "" if ratio is None else f"{ratio:.2f}"]))
    results = [each for several in found.values() for each in several if each]
    page = f"""# Long texts

Windows of {arguments.window}, hidden size {CONFIG.hidden_size}, {CONFIG.num_hidden_layers} layers, {arguments.dtype},
medians of {arguments.rounds} rounds, each point in a process of its own; the peak is what it takes beyond the model.
{machine()}; {versions(results)}.
Flat is at most {FLAT} from {BASE} windows on. Repeat: `python -m benchmarks.long_texts --write`.

{chr(10).join(lines)}
"""
    return page, flat


if __name__ == "__main__":
    sys.exit(main())
