"""Generating text: our backends and the peers that are installed, in turn in one run, and the ratios we demand.

    python -m benchmarks.compare [--dtype float32,bfloat16] [--batch 1,4] [--rounds 3] [--only torch,llama,...]
        [--transformers5 PY] [--transformers4 PY] [--keras-hub PY] [--llama PY] [--write]

PY is the Python of a virtual environment in which the peer is installed: transformers 5 with torch; transformers
4.56.2 with TensorFlow, JAX and Flax; keras-hub with JAX and TensorFlow; llama-cpp-python with gguf. One model for all
(size half of benchmarks.decode), random weights, greedy, no end of sequence, each program warmed up, in a process of
its own in every round. Ratios are taken within each round, then their median. Of two settings of a peer the better
counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from typing import Any, NamedTuple

from .common import MeasurementError, keep, listed, machine, measure, report, shown, table_row, versions
from .decode import BYTES, HALF, step_bytes, task

PROMPT, NEW = 128, 32
FULL, SINGLE = ("float32", "bfloat16"), ("float32",)
PYTHONS = ("transformers5", "transformers4", "keras_hub", "llama")
RESULT = "decode.md"


class Program(NamedTuple):
    """One row of the table."""

    name: str
    family: str
    """Rows of one family are settings of the same peer."""
    module: str
    options: dict[str, Any]
    python: str | None = None
    """The argument that gives its Python; None is this one."""
    dtypes: tuple[str, ...] = FULL


def ours(backend: str, compiling: str) -> Program:
    """A backend of this project."""
    options = {"backend": backend, "compile": compiling, "measure": "generate"}
    return Program(f"ours, {backend}, compile={compiling}", backend, "ours", options)


PROGRAMS = (
    ours("torch", "max"),
    ours("flax", "auto"),
    ours("tf", "auto"),
    Program("transformers 5, torch", "transformers5", "transformers_torch", {}, "transformers5"),
    Program("... static cache, compiled", "transformers5", "transformers_torch", {"static": True}, "transformers5"),
    Program("transformers 4, TF", "transformers4-tf", "transformers_tf", {}, "transformers4", SINGLE),
    Program("transformers 4, Flax, jitted", "transformers4-flax", "transformers_flax", {}, "transformers4", SINGLE),
    Program("keras-hub, JAX", "keras-jax", "keras_hub", {"backend": "jax"}, "keras_hub"),
    Program("keras-hub, TF", "keras-tf", "keras_hub", {"backend": "tensorflow"}, "keras_hub"),
    Program("... without XLA", "keras-tf", "keras_hub", {"backend": "tensorflow", "jit_compile": False}, "keras_hub"),
    Program("llama.cpp", "llama", "llama_cpp", {}, "llama"),
)


class Demand(NamedTuple):
    """A ratio that must be reached: of two families at (dtype, batch), in tokens a second of a phase."""

    ours: str
    theirs: str
    at: tuple[str, int]
    least: float
    goal: float | None = None
    phase: str = "step"
    theirs_at: tuple[str, int] | None = None

    @property
    def text(self) -> str:
        """What is compared."""
        dtype, batch = self.at
        other = f"{self.theirs} {self.theirs_at[0]}" if self.theirs_at else self.theirs
        phase = {"step": "decode", "first": "prefill"}[self.phase]
        return f"{self.ours} / {other}: {phase}, {dtype}, batch {batch}"


FLAX = next(program for program in PROGRAMS if program.family == "flax")
ONE, HALF_ONE, FOUR = ("float32", 1), ("bfloat16", 1), ("float32", 4)
DEMANDS = (
    Demand("torch", "transformers5", ONE, 2.0),
    Demand("torch", "llama", ONE, 0.9),
    Demand("torch", "transformers5", HALF_ONE, 2.0, 3.0),
    Demand("torch", "llama", HALF_ONE, 0.7, 0.95),
    Demand("torch", "transformers5", FOUR, 2.0),
    Demand("torch", "transformers5", ONE, 1.0, phase="first"),
    Demand("torch", "transformers5", HALF_ONE, 1.0, phase="first"),
    Demand("torch", "transformers5", FOUR, 1.0, phase="first"),
    Demand("flax", "torch", ONE, 0.6, 0.8),
    Demand("flax", "keras-jax", ONE, 2.5),
    Demand("flax", "flax", HALF_ONE, 1.0, theirs_at=ONE),
    Demand("flax", "torch", HALF_ONE, 0.0, 0.7),
    Demand("tf", "torch", ONE, 0.45, 0.8),
    Demand("tf", "transformers4-tf", ONE, 4.5),
    Demand("tf", "keras-tf", ONE, 1.6),
    Demand("tf", "tf", HALF_ONE, 1.0, theirs_at=ONE),
)

Key = tuple[str, str, int]
"""Program's name, dtype, batch."""


def run(arguments: argparse.Namespace, scratch: str) -> tuple[dict[Key, list], dict[tuple[str, str], list]]:
    """What every program and every limit gave, a result a round; None where a program failed."""
    pythons = {None: sys.executable, **{name: getattr(arguments, name) for name in PYTHONS}}
    programs = [p for p in PROGRAMS if pythons[p.python] and (not arguments.only or p.family in arguments.only)]
    found: dict[Key, list] = {}
    limits: dict[tuple[str, str], list] = {}
    for number, dtype, batch in itertools.product(range(arguments.rounds), arguments.dtype, arguments.batch):
        if batch == arguments.batch[0]:
            for framework in ("torch", "flax", "tf"):
                asked = {"dtype": dtype, "calls": 5, "options": {"framework": framework}}
                limits.setdefault((framework, dtype), []).append(measure("limits", asked, scratch=scratch))
        for program in programs:
            if dtype not in program.dtypes:
                continue
            key = (program.name, dtype, batch)
            asked = task(HALF, dtype=dtype, batch=batch, prompt=PROMPT, new=NEW, calls=3, options=program.options)
            result = attempt(program.module, asked, pythons[program.python], scratch)
            report(f"round {number + 1}: {', '.join(map(str, key))}: {brief(result)}")
            found.setdefault(key, []).append(result)
    return found, limits


def attempt(module: str, asked: dict[str, Any], python: str, scratch: str) -> dict[str, Any] | None:
    """A program's result; one that cannot do what is asked is reported, and the run goes on."""
    try:
        return measure(module, asked, python=python, scratch=scratch)
    except MeasurementError as error:
        report(str(error))
        return None


def brief(result: dict[str, Any] | None) -> str:
    """What a program gave, in a line."""
    if result is None:
        return "failed"
    return f"first token {1e3 * result['first']:.0f} ms, a step {1e3 * result['step']:.1f} ms"


def rates(found: dict[Key, list], family: str, at: tuple[str, int], phase: str) -> list[float | None]:
    """Of each round, how often in a second the better setting of a family does a phase; None where it failed."""
    settings = [found[p.name, *at] for p in PROGRAMS if p.family == family and (p.name, *at) in found]
    rounds = zip(*settings, strict=True)
    return [max((1 / result[phase] for result in results if result), default=None) for results in rounds]


def reached(found: dict[Key, list], demand: Demand) -> float | None:
    """The median over the rounds of a demanded ratio; None where it was not measured."""
    over = rates(found, demand.ours, demand.at, demand.phase)
    under = rates(found, demand.theirs, demand.theirs_at or demand.at, demand.phase)
    ratios = [a / b for a, b in zip(over, under, strict=False) if a and b]
    return statistics.median(ratios) if ratios else None


def table(found: dict[Key, list], limits: dict[tuple[str, str], list]) -> str:
    """The first table: what was measured."""
    head = ["", "dtype", "batch", "prefill tok/s", "decode tok/s", "of read", "peak GB", "decode / our torch"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    for (name, dtype, batch), results in sorted(found.items(), key=lambda item: (item[0][2], item[0][1] != "float32")):
        results = [result for result in results if result]
        if not results:
            lines.append(table_row([name, dtype, batch, "failed", "", "", "", ""]))
            continue
        first, step, peak = (statistics.median(r[key] for r in results) for key in ("first", "step", "peak"))
        read = statistics.median(limit["read"] for key, kept in limits.items() if key[1] == dtype for limit in kept)
        moved = step_bytes(HALF, dtype=dtype, batch=batch, length=PROMPT + NEW / 2)
        base = [rate for rate in rates(found, "torch", (dtype, batch), "step") if rate]
        against = shown(1 / step / statistics.median(base)) if base else ""
        cells = [batch * PROMPT / first, batch / step, moved / step / read, peak / 1e9]
        lines.append(table_row([name, dtype, batch, *map(shown, cells), against]))
    return "\n".join(lines)


def demands(found: dict[Key, list]) -> tuple[str, bool]:
    """The second table: what is demanded and what was reached; and whether nothing measured falls short."""
    lines = [table_row(["ratio", "must", "goal", "reached", ""]), table_row(["---"] * 5)]
    kept = True
    for demand in DEMANDS:
        value = reached(found, demand)
        met = value is None or value >= demand.least
        kept &= met
        verdict = "not measured" if value is None else "kept" if met else "short"
        goal = "" if demand.goal is None else demand.goal
        lines.append(table_row([demand.text, demand.least, goal, "" if value is None else shown(value), verdict]))
    again = [
        result["compilations"] for key, results in found.items() if key[0] == FLAX.name for result in results if result
    ]
    if again:
        kept &= max(again) == 0
        verdict = "short" if max(again) else "kept"
        lines.append(table_row(["flax: compilations after the first call", 0, "", max(again), verdict]))
    return "\n".join(lines), kept


def page(
    arguments: argparse.Namespace, found: dict[Key, list], limits: dict[tuple[str, str], list]
) -> tuple[str, bool]:
    """Both tables with the facts of the machine, and whether the demands are kept."""
    second, kept = demands(found)
    allowed = "; ".join(
        f"{framework} {dtype} {statistics.median(one['matmul'] for one in kept_) / 1e9:.0f} GFLOP/s"
        for (framework, dtype), kept_ in limits.items()
    )
    reads = [one["read"] / 1e9 for several in limits.values() for one in several]
    made_by = versions(result for results in found.values() for result in results if result)
    text = f"""# Decoding, side by side

Size half ({HALF.hidden_size} hidden, {HALF.num_hidden_layers} layers, {HALF.num_attention_heads} query and
{HALF.num_key_value_heads} key-value heads of {HALF.head_dim}, {HALF.intermediate_size}, vocabulary {HALF.vocab_size}),
prompt of {PROMPT} tokens, {NEW} new ones, greedy, medians of {arguments.rounds} interleaved rounds, each program in a
process of its own.
{machine()}; {made_by}.
Prefill is the prompt's tokens over the time to the first new one. Repeat: `python -m benchmarks.compare --write` with
the peers' Pythons.

{table(found, limits)}

Limits in the same run: streaming read {statistics.median(reads):.0f} GB/s ({min(reads):.0f} to {max(reads):.0f});
large matrix products: {allowed}.

## What is demanded

Ratios of tokens a second within a round, their median; of two settings of a peer the better counts.

{second}
"""
    return text, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", type=listed, default=list(BYTES))
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=listed, help="families, as the ratios name them")
    for name in PYTHONS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PY", help="a Python that has it")
    parser.add_argument("--write", action="store_true", help=f"keep the page in benchmarks/results/{RESULT}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found, limits = run(arguments, scratch)
    text, kept = page(arguments, found, limits)
    print(text)
    if arguments.write:
        keep(RESULT, text)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
