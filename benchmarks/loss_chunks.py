"""The loss of a language model from chunks of logits against whole logits: peak memory and time of a training step.

    python -m benchmarks.loss_chunks [--backend torch,flax,tf] [--rounds 1] [--write]

One layer under a head of 131072 tokens of vocabulary, 2048 tokens of text: loss and all gradients, in Keras a step of
`fit`. Each step in a process of its own, rounds outside. The peak is what a process takes beyond its model before the
first step; times are of a later step, on this machine at that moment, so read the ratios, taken within each round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mistral_core import loss_chunks
from mistral_core.config.presets import TINY

from .common import POLITE, ROOT, keep, listed, machine, peak_memory, report, say, shown, table_row, versions

CONFIG = TINY.replace(
    vocab_size=131072, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2,
    head_dim=64, num_hidden_layers=1, layer_types=None, tie_word_embeddings=False,
)  # fmt: skip
TOKENS = 2048
COLUMNS = ("backend", "peak, whole, GB", "peak, chunks, GB", "times less", "s, whole", "s, chunks", "times as long")
PACKAGES = {"torch": ("torch",), "flax": ("jax", "flax"), "tf": ("tensorflow", "keras")}
PLANNED: list[float] = []
"""GB of temporaries of the program that was compiled in this process."""

# In the child


def step_torch(ids: np.ndarray) -> Callable[[], Any]:
    """Loss and gradients of a model that trains."""
    import torch

    from mistral_torch import MistralForCausalLM

    model, rows = MistralForCausalLM(CONFIG).train(), torch.from_numpy(ids)

    def step() -> Any:
        model.zero_grad()
        model(rows, labels=rows).loss.backward()

    return step


def step_flax(ids: np.ndarray) -> Callable[[], Any]:
    """Loss and gradients as one program."""
    import jax

    from mistral_flax import MistralForCausalLM

    model = MistralForCausalLM(CONFIG)
    loss = jax.value_and_grad(lambda params: model(ids, params=params, labels=ids).loss)
    program = jax.jit(loss).lower(model.params).compile()
    PLANNED.append(program.memory_analysis().temp_size_in_bytes / 1e9)
    return lambda: jax.block_until_ready(program(model.params))


def step_tf(ids: np.ndarray) -> Callable[[], Any]:
    """A step of `fit`."""
    import keras

    from mistral_tf import MistralForCausalLM

    model = MistralForCausalLM(CONFIG)
    model.compile(keras.optimizers.SGD(0.0))
    return lambda: model.train_on_batch(ids, ids)


def child(backend: str, way: str) -> None:
    """Measure one way in this process and say what was found."""
    if way == "whole":
        loss_chunks.MANY = math.inf  # type: ignore[assignment]
    step = {"torch": step_torch, "flax": step_flax, "tf": step_tf}[backend](
        np.random.default_rng(0).integers(3, CONFIG.vocab_size, (1, TOKENS))
    )
    before = held()
    step()
    start = time.perf_counter()
    step()
    found = {"seconds": time.perf_counter() - start, "peak": (peak_memory() - before) / 1e9, "planned": PLANNED}
    say(found, *PACKAGES[backend])


def held() -> int:
    """The bytes this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# In the parent


def measured(backend: str, way: str) -> dict[str, Any]:
    """What a fresh process found."""
    report(f"{backend}, {way}")
    command = [sys.executable, "-m", "benchmarks.loss_chunks", "--child", f"{backend},{way}"]
    environment = {**os.environ, **POLITE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, and with --write keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", type=listed, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    rows, found = [table_row(COLUMNS), "|---" * len(COLUMNS) + "|"], []
    for backend in arguments.backend:
        rounds = [[measured(backend, way) for way in ("whole", "chunks")] for _ in range(arguments.rounds)]
        found += [each for pair in rounds for each in pair]
        cells = []
        for key, power in (("peak", 1), ("seconds", -1)):
            pairs = [(whole[key], chunks[key]) for whole, chunks in rounds]
            cells += map(statistics.median, zip(*pairs, strict=True))
            cells.append(statistics.median((whole / chunks) ** power for whole, chunks in pairs))
        rows.append(table_row([backend, *map(shown, cells)]))
        if rounds[0][0]["planned"]:
            whole, chunks = (each["planned"][0] for each in rounds[0])
            rows.append(
                table_row(["temporaries, as XLA plans them", *map(shown, (whole, chunks, whole / chunks)), *[""] * 3])
            )
    chunk, mb = loss_chunks.CHUNK // CONFIG.vocab_size, CONFIG.vocab_size * CONFIG.hidden_size * 4 / 1e6
    text = f"""# The loss from chunks of logits

Loss and gradients of one layer of hidden size {CONFIG.hidden_size} under a head of {CONFIG.vocab_size} tokens, for
{TOKENS} tokens of text, float32: whole logits against chunks of {chunk} tokens. Peaks are of what a process takes
beyond the model: the gradients of head and embedding, {mb:.0f} MB each, are in both, and so is
what JAX takes to compile.
Rounds: {arguments.rounds}. {machine()};
{versions(found)}.
Repeat: `python -m benchmarks.loss_chunks --write`.

{chr(10).join(rows)}
"""
    print(text)
    if arguments.write:
        keep("loss_chunks.md", text)


if __name__ == "__main__":
    main()
