"""Generating text: speed and memory of our own backends, against the limits of the machine in the same run.

    python -m benchmarks.decode --size tiny|half|7b [--backend torch,flax,tf] [--dtype float32,bfloat16] [--batch 1,4]
        [--prompt 128] [--new 32] [--compile auto|off|on|max] [--repeats 3] [--json] [--write]
    python -m benchmarks.decode --windows   # a step's cost and the peak memory from 1 to 8 windows of text
    python -m benchmarks.decode --overhead  # generate of one token at tiny size, after compilation

Random weights, no checkpoint. Each measurement is a process of its own, rounds interleaved, medians. Decoding is held
against streaming read bandwidth (a step reads every weight but the embeddings, and the cache), the prompt against a
large matrix product in the same framework and dtype. Compile time is the first call minus later ones, in the first
round: later rounds find what it kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import tempfile
from typing import Any

from mistral_core import MistralConfig
from mistral_core.config.presets import PRESETS, TINY
from mistral_core.parameters import parameters, shape_of

from .common import keep, listed, machine, measure, middle, report, shown, table_row, versions

HALF = MistralConfig(
    hidden_size=2048, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
    intermediate_size=7168, vocab_size=32000, max_position_embeddings=4096,
)  # fmt: skip
"""Few positions, for transformers' Flax makes a mask of their square."""
SIZES = {"tiny": TINY, "half": HALF, "7b": PRESETS["mistral-7b-v0.1"]}
WINDOWED = MistralConfig(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    intermediate_size=1408, vocab_size=4096, sliding_window=256,
)  # fmt: skip
"""Small, but a cache of the whole of 8 windows would weigh a third of it."""
WINDOWS = 8
FLAT, OVERHEAD = 1.1, 5.0
"""The most a step may cost after 8 windows as a multiple of the first, and milliseconds for one token at tiny size."""
BYTES = {"float32": 4, "bfloat16": 2}
FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings")  # fmt: skip
COLUMNS = (
    "backend", "dtype", "batch", "prefill tok/s", "of matmul", "decode tok/s", "of read", "first token ms",
    "compile s", "peak GB", "GB a step",
)  # fmt: skip


def task(config: MistralConfig, **asked: Any) -> dict[str, Any]:
    """What a program is asked, the sizes by Hugging Face's names."""
    return {"sizes": {name: getattr(config, name) for name in FIELDS}, **asked}


def matrices(config: MistralConfig) -> int:
    """How many numbers a decoded token reads of the weights: all but the embeddings."""
    return sum(math.prod(shape_of(row, config)) for _, row in parameters(config) if row.kind != "embedding")


def step_bytes(config: MistralConfig, *, dtype: str, batch: int, length: float) -> float:
    """Bytes read by a step after `length` tokens: weights once, a row of embeddings and the visible cache per row."""
    seen = sum(min(length, window or length) for window in config.layer_windows)
    cache = 2 * config.num_key_value_heads * config.head_dim * seen
    return BYTES[dtype] * (matrices(config) + batch * (config.hidden_size + cache))


def prompt_operations(config: MistralConfig, *, batch: int, prompt: int) -> float:
    """Operations of the matrix products of a prompt; the head's at its last token alone."""
    head = config.vocab_size * config.hidden_size
    return 2 * batch * ((matrices(config) - head) * prompt + head)


def figures(config: MistralConfig, asked: dict[str, Any], found: list[dict], limits: list[dict]) -> dict[str, Any]:
    """The columns of one combination, from its rounds and those of its limits."""
    dtype, batch, prompt = asked["dtype"], asked["batch"], asked["prompt"]
    first, step = middle(found, "first"), middle(found, "step")
    moved = step_bytes(config, dtype=dtype, batch=batch, length=prompt + asked["new"] / 2)
    rate = prompt_operations(config, batch=batch, prompt=prompt) / first
    return {
        "backend": asked["options"]["backend"],
        "dtype": dtype,
        "batch": batch,
        "prefill tok/s": batch * prompt / first,
        "of matmul": rate / middle(limits, "matmul"),
        "decode tok/s": batch / step,
        "of read": moved / step / middle(limits, "read"),
        "first token ms": 1e3 * first,
        "compile s": found[0]["compile"],
        "peak GB": middle(found, "peak") / 1e9,
        "GB a step": moved / 1e9,
        "read GB/s": middle(limits, "read") / 1e9,
        "matmul GFLOP/s": middle(limits, "matmul") / 1e9,
        "versions": found[0]["versions"],
    }


def speed(arguments: argparse.Namespace, scratch: str) -> list[dict[str, Any]]:
    """The figures of every combination asked for; rounds outside, so that drift of the machine meets all alike."""
    config = SIZES[arguments.size]
    combinations = list(itertools.product(arguments.backend, arguments.dtype, map(int, arguments.batch)))
    found: dict[Any, list[dict]] = {combination: [] for combination in combinations}
    limits: dict[Any, list[dict]] = {(backend, dtype): [] for backend, dtype, _ in combinations}
    common = {"prompt": arguments.prompt, "new": arguments.new, "calls": 3}

    def asked(backend: str, dtype: str, batch: int) -> dict[str, Any]:
        options = {"backend": backend, "compile": arguments.compile, "measure": "generate"}
        return task(config, dtype=dtype, batch=batch, options=options, **common)

    for number in range(arguments.repeats):
        for backend, dtype in limits:
            limit = {"dtype": dtype, "calls": 5, "options": {"framework": backend}}
            limits[backend, dtype].append(measure("limits", limit, scratch=scratch))
        for combination in combinations:
            report(f"round {number + 1}: {', '.join(map(str, combination))}")
            found[combination].append(measure("ours", asked(*combination), scratch=scratch))
    return [figures(config, asked(*c), found[c], limits[c[:2]]) for c in combinations]


def speed_page(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The figures as a page of Markdown."""
    lines = [table_row(COLUMNS), table_row(["---"] * len(COLUMNS))]
    lines += [table_row(shown(row[column]) for column in COLUMNS) for row in rows]
    limits = "; ".join(
        f"{row['backend']} {row['dtype']}: matmul {row['matmul GFLOP/s']:.0f} GFLOP/s, read {row['read GB/s']:.0f} GB/s"
        for row in rows
        if row["batch"] == rows[0]["batch"]
    )
    return f"""# Decoding, size {arguments.size}

Prompt of {arguments.prompt} tokens, {arguments.new} new ones, greedy, compile={arguments.compile}, medians of
{arguments.repeats} rounds.
{machine()}; {versions(rows)}.
Repeat: `python -m benchmarks.decode {shlex.join(sys.argv[1:])}`.

{chr(10).join(lines)}

Limits in the same run: {limits}.
"""


def windows(arguments: argparse.Namespace, scratch: str) -> tuple[str, bool]:
    """The page of a step's cost and peak memory by windows of text, and whether both stay flat."""
    length = WINDOWS * WINDOWED.sliding_window
    prompt = 16
    found: dict[str, list[dict]] = {backend: [] for backend in arguments.backend}
    for number, backend in itertools.product(range(arguments.repeats), arguments.backend):
        report(f"round {number + 1}: {backend}")
        options = {"backend": backend, "compile": arguments.compile, "measure": "windows"}
        asked = task(WINDOWED, dtype="float32", batch=1, prompt=prompt, new=length - prompt, options=options)
        found[backend].append(measure("ours", asked, scratch=scratch))
    lines = [table_row(["backend", "", *range(1, WINDOWS + 1), "most / first"]), table_row(["---"] * (WINDOWS + 3))]
    kept = True
    for backend, rounds in found.items():
        for key, unit, scale in (("step", "ms a token", 1e3), ("peak", "peak MB", 1e-6)):
            values = [statistics.median(r[key][n] for r in rounds) * scale for n in range(WINDOWS)]
            ratio = max(values) / values[0]
            kept &= ratio <= FLAT
            lines.append(table_row([backend, unit, *(f"{value:.4g}" for value in values), f"{ratio:.3f}"]))
    page = f"""# Decoding through windows of text

A token's cost (the median within each window) and the process' peak memory at the end of each, from 1 to {WINDOWS}
windows of {WINDOWED.sliding_window} tokens, in one call of generate; float32, hidden size {WINDOWED.hidden_size},
{WINDOWED.num_hidden_layers} layers, compile={arguments.compile}; medians of {arguments.repeats} rounds.
{machine()}; {versions(itertools.chain(*found.values()))}.
Flat is a ratio of at most {FLAT}. Repeat: `python -m benchmarks.decode --windows --write`.

{chr(10).join(lines)}
"""
    return page, kept


def overhead(arguments: argparse.Namespace, scratch: str) -> tuple[str, bool]:
    """The page of generate's wall time for one token at tiny size, and whether it is short enough everywhere."""
    found: dict[str, list[dict]] = {backend: [] for backend in arguments.backend}
    for _, backend in itertools.product(range(arguments.repeats), arguments.backend):
        options = {"backend": backend, "compile": arguments.compile, "measure": "overhead"}
        asked = task(TINY, dtype="float32", batch=1, prompt=8, new=1, options=options)
        found[backend].append(measure("ours", asked, scratch=scratch))
    lines = [table_row(["backend", "ms"]), table_row(["---"] * 2)]
    lines += [table_row([backend, f"{1e3 * middle(rounds, 'one'):.2f}"]) for backend, rounds in found.items()]
    kept = all(1e3 * middle(rounds, "one") <= OVERHEAD for rounds in found.values())
    page = f"""# Overhead of generate

Wall time of the whole of `generate` of 1 token at tiny size ({TINY.num_hidden_layers} layers of hidden size
{TINY.hidden_size}, prompt of 8 tokens, compile={arguments.compile}), after compilation: nearly all of it is Python
and dispatch.
Medians of {arguments.repeats} processes. {machine()}; {versions(itertools.chain(*found.values()))}.
The limit is {OVERHEAD} ms. Repeat: `python -m benchmarks.decode --overhead --write`.

{chr(10).join(lines)}
"""
    return page, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="half")
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--dtype", type=listed, default=["float32"])
    parser.add_argument("--batch", type=listed, default=["1"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--compile", choices=("auto", "off", "on", "max"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON lines in place of the page")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.windows or arguments.overhead:
            name = "decode_windows.md" if arguments.windows else "decode_overhead.md"
            page, kept = (windows if arguments.windows else overhead)(arguments, scratch)
        else:
            rows = speed(arguments, scratch)
            name, page, kept = f"decode_{arguments.size}.md", speed_page(arguments, rows), True
            if arguments.json:
                page = "\n".join(json.dumps(row) for row in rows)
    print(page, end="" if page.endswith("\n") else "\n")
    if arguments.write:
        keep(name, page)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
