"""Generating text from packed weights: each backend beside its own bfloat16, and llama.cpp, in turn in one run.

    python -m benchmarks.quantized [--backend torch,flax,tf] [--rounds 3] [--prompt 512] [--llama PY] [--write]

Model half of benchmarks.decode, random weights, bfloat16 but for what is packed, greedy, each program in a process of
its own, rounds outside. PY is the Python of an environment with llama-cpp-python and gguf. Ratios are taken within
each round, then their median: of a scheme to the backend's own bfloat16, and to llama.cpp's nearest type, whose
kernels round activations to int8.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
from typing import Any

from .common import keep, listed, machine, measure, report, shown, table_row, versions
from .decode import HALF, task

SCHEMES: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "int8": {"scheme": "int8", "head": "int8"},
    "int4": {"scheme": "int4"},
    "nf4": {"scheme": "nf4"},
    "int4, activations int8": {"scheme": "int4", "activations": "int8"},
}
PEERS = {"bfloat16": "bfloat16", "int8": "q8_0", "int4": "q4_0", "int4, activations int8": "q4_0"}
"""Scheme -> the type of llama.cpp beside it."""
COLUMNS = ("backend", "weights", "prompt tok/s", "of bf16", "decode tok/s", "of bf16", "of llama.cpp", "peak GB")
NEW = 48


def measured(arguments: argparse.Namespace, scratch: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(program, weights) -> what each round found."""
    common = {"batch": 1, "prompt": arguments.prompt, "new": NEW, "calls": 3}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    schemes = {name: SCHEMES[name] for name in arguments.schemes}
    for number in range(arguments.rounds):
        for backend, (scheme, quantization) in itertools.product(arguments.backend, schemes.items()):
            report(f"round {number + 1}: {backend}, {scheme}")
            options = {"backend": backend, "compile": arguments.compile, "measure": "generate"}
            asked = task(HALF, dtype="bfloat16", options={**options, "quantization": quantization}, **common)
            found.setdefault((backend, scheme), []).append(measure("ours", asked, scratch=scratch))
        for peer in dict.fromkeys(PEERS[name] for name in schemes if name in PEERS) if arguments.llama else ():
            report(f"round {number + 1}: llama.cpp, {peer}")
            asked = task(HALF, dtype=peer, options={}, **common)
            found.setdefault(("llama.cpp", peer), []).append(
                measure("llama_cpp", asked, scratch=scratch, python=arguments.llama)
            )
    return found


def ratio(rounds: list[dict[str, Any]], beside: list[dict[str, Any]] | None, key: str) -> str:
    """How many times as fast, the median over rounds."""
    if beside is None:
        return ""
    return f"{statistics.median(b[key] / a[key] for a, b in zip(rounds, beside, strict=True)):.2f}"


def page(arguments: argparse.Namespace, found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The table as Markdown."""
    lines = [table_row(COLUMNS), table_row(["---"] * len(COLUMNS))]
    for (program, weights), rounds in found.items():
        own = found.get((program, "bfloat16"))
        peer = found.get(("llama.cpp", PEERS.get(weights, ""))) if program != "llama.cpp" else None
        first, step = (statistics.median(each[key] for each in rounds) for key in ("first", "step"))
        lines.append(
            table_row([
                program, weights, shown(arguments.prompt / first), ratio(rounds, own, "first"), shown(1 / step),
                ratio(rounds, own, "step"), ratio(rounds, peer, "step"),
                shown(statistics.median(each["peak"] for each in rounds) / 1e9),
            ])
        )  # fmt: skip
    return f"""# Packed weights

Size half, a prompt of {arguments.prompt} tokens, {NEW} new ones, greedy, batch 1, compile={arguments.compile}, all but
the packed matrices in bfloat16; int4 in groups of 128 with a head of int8. Medians of {arguments.rounds} rounds.
{machine()}; {versions(itertools.chain(*found.values()))}.
Repeat: `python -m benchmarks.quantized {shlex.join("PY" if a == arguments.llama else a for a in sys.argv[1:])}`.

{chr(10).join(lines)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--schemes", type=lambda text: text.split(";"), default=list(SCHEMES), help="separated by ;")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--compile", choices=("auto", "off", "on", "max"), default="auto")
    parser.add_argument("--llama", metavar="PY")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = page(arguments, measured(arguments, scratch))
    print(text, end="")
    if arguments.write:
        keep("quantized.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
