"""Generating text: our backends and the peers that are installed, in turn in one run, and the ratios we demand.

    python -m benchmarks.compare [--dtype float32,bfloat16] [--batch 1,4,16] [--prompt 128,512,2048] [--rounds 3]
        [--only torch,llama,...] [--transformers5 PY] [--transformers4 PY] [--keras-hub PY] [--llama PY] [--write]

PY is the Python of a virtual environment in which the peer is installed: transformers 5 with torch; transformers
4.56.2 with TensorFlow, JAX and Flax; keras-hub with JAX and TensorFlow; llama-cpp-python with gguf. One model for all
(size half of benchmarks.decode), random weights, greedy, no end of sequence, each program warmed up, in a process of
its own in every round. Several rows are measured with the first prompt, and longer prompts with one row. Ratios are
taken within each round, then their median. Of two settings of a peer the better counts.
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

PROMPTS, BATCHES, NEW = (128, 512, 2048), (1, 4, 16), 32
FULL, SINGLE = ("float32", "bfloat16"), ("float32",)
PYTHONS = ("transformers5", "transformers4", "keras_hub", "llama")
RESULT = "decode.md"


class Point(NamedTuple):
    """What is generated: the dtype, how many rows, and how long their prompts are."""

    dtype: str
    batch: int = 1
    prompt: int = PROMPTS[0]

    @property
    def text(self) -> str:
        """The point in words."""
        rows = "one row" if self.batch == 1 else f"{self.batch} rows"
        return f"{self.dtype}, {rows} of {self.prompt}"


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
    everywhere: bool = False
    """Whether it is measured with several rows and longer prompts too."""


def ours(backend: str, family: str | None = None, *, compiling: str = "auto") -> Program:
    """A backend of this project."""
    options = {"backend": backend, "compile": compiling, "measure": "generate"}
    name = f"ours, {backend}" if compiling == "auto" else f"ours, {backend}, compile={compiling}"
    return Program(name, family or backend, "ours", options, everywhere=compiling == "auto")


def peer(
    name: str, family: str, module: str, python: str, *, dtypes: tuple[str, ...] = FULL, everywhere: bool = False,
    **options: Any,
) -> Program:  # fmt: skip
    """A program of others, in an environment of its own."""
    return Program(name, family, module, options, python, dtypes, everywhere)


PROGRAMS = (
    ours("torch"),
    ours("torch", "torch-max", compiling="max"),
    ours("flax"),
    ours("tf"),
    peer("transformers 5, torch", "transformers5", "transformers_torch", "transformers5", everywhere=True),
    peer("... static cache, compiled", "transformers5", "transformers_torch", "transformers5", static=True),
    peer("transformers 4, TF", "transformers4-tf", "transformers_tf", "transformers4", dtypes=SINGLE),
    peer("transformers 4, Flax, jitted", "transformers4-flax", "transformers_flax", "transformers4", dtypes=SINGLE),
    peer("keras-hub, JAX", "keras-jax", "keras_hub", "keras_hub", backend="jax"),
    peer("keras-hub, TF", "keras-tf", "keras_hub", "keras_hub", backend="tensorflow"),
    peer("... without XLA", "keras-tf", "keras_hub", "keras_hub", backend="tensorflow", jit_compile=False),
    peer("llama.cpp", "llama", "llama_cpp", "llama"),
)


class Demand(NamedTuple):
    """A ratio that must be reached: of two families, in tokens a second of a phase."""

    ours: str
    theirs: str
    at: Point
    least: float
    phase: str = "step"
    theirs_at: Point | None = None

    @property
    def text(self) -> str:
        """What is compared."""
        phase = {"step": "decode", "first": "prompt"}[self.phase]
        other = f", {self.theirs_at.text}" if self.theirs_at else ""
        return f"{self.ours} / {self.theirs}{other}: {phase}, {self.at.text}"


def demanded(dtype: str) -> list[Demand]:
    """What the default settings must reach in a dtype."""
    one, rows = Point(dtype), [Point(dtype, batch) for batch in BATCHES]
    longer = [Point(dtype, prompt=prompt) for prompt in PROMPTS]
    of_torch = 0.8 if dtype == "bfloat16" else 0.9
    return [
        *(Demand("torch", "transformers5", point, 1.0) for point in rows),
        *(Demand("torch", "transformers5", point, 1.0, "first") for point in [*longer, *rows[1:]]),
        Demand("torch-max", "llama", one, 0.95),
        *(Demand(backend, "torch", one, of_torch) for backend in ("flax", "tf")),
        *(Demand(backend, "torch", point, 0.8, "first") for point in longer for backend in ("flax", "tf")),
        *(Demand(each, each, rows[1], 3.2, theirs_at=one) for each in ("torch", "flax", "tf")),
        *(Demand(each, each, rows[2], 9.0, theirs_at=one) for each in ("torch", "flax", "tf")),
    ]


DEMANDS = [demand for dtype in FULL for demand in demanded(dtype)]
FLAX = next(program for program in PROGRAMS if program.family == "flax")

Found = dict[tuple[str, Point], list]
"""Of a program's name and a point, a result a round; None where the program failed."""
Limits = dict[tuple[str, str], list]
"""Of a framework and a dtype, what the machine allowed in each round."""


def points(arguments: argparse.Namespace) -> list[Point]:
    """What is measured: several rows with the first prompt, longer prompts with one row."""
    first, *longer = arguments.prompt
    rows = [Point(dtype, batch, first) for dtype in arguments.dtype for batch in arguments.batch]
    return [*rows, *(Point(dtype, 1, prompt) for dtype in arguments.dtype for prompt in longer)]


def run(arguments: argparse.Namespace, scratch: str) -> tuple[Found, Limits]:
    """What every program and every limit gave."""
    pythons = {None: sys.executable, **{name: getattr(arguments, name) for name in PYTHONS}}
    programs = [p for p in PROGRAMS if pythons[p.python] and (not arguments.only or p.family in arguments.only)]
    asked_points = points(arguments)
    found: Found = {}
    limits: Limits = {}
    for number in range(arguments.rounds):
        for framework, dtype in itertools.product(("torch", "flax", "tf"), arguments.dtype):
            asked = {"dtype": dtype, "calls": 5, "options": {"framework": framework}}
            limits.setdefault((framework, dtype), []).append(measure("limits", asked, scratch=scratch))
        for point, program in itertools.product(asked_points, programs):
            if point.dtype not in program.dtypes or not (program.everywhere or point == Point(point.dtype)):
                continue
            asked = task(HALF, **point._asdict(), new=NEW, calls=3, options=program.options)
            result = attempt(program.module, asked, pythons[program.python], scratch)
            report(f"round {number + 1}: {program.name}, {point.text}: {brief(result)}")
            found.setdefault((program.name, point), []).append(result)
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


def rates(found: Found, family: str, at: Point, phase: str) -> list[float | None]:
    """Of each round, the tokens a second of the better setting of a family in a phase; None where it failed."""
    settings = [found[p.name, at] for p in PROGRAMS if p.family == family and (p.name, at) in found]
    tokens = at.batch * (at.prompt if phase == "first" else 1)
    rounds = zip(*settings, strict=True)
    return [max((tokens / result[phase] for result in results if result), default=None) for results in rounds]


def reached(found: Found, demand: Demand) -> float | None:
    """The median over the rounds of a demanded ratio; None where it was not measured."""
    over = rates(found, demand.ours, demand.at, demand.phase)
    under = rates(found, demand.theirs, demand.theirs_at or demand.at, demand.phase)
    ratios = [a / b for a, b in zip(over, under, strict=False) if a and b]
    return statistics.median(ratios) if ratios else None


def table(found: Found, limits: Limits) -> str:
    """The first table: what was measured."""
    head = ["", "dtype", "rows", "prompt", "prompt tok/s", "decode tok/s", "of read", "peak GB"]
    lines = [table_row(head), table_row(["---"] * len(head))]
    order = {point: number for number, point in enumerate(dict.fromkeys(point for _, point in found))}
    for (name, point), every in sorted(found.items(), key=lambda item: order[item[0][1]]):
        results = [result for result in every if result]
        if not results:
            lines.append(table_row([name, *point, "failed", "", "", ""]))
            continue
        first, step, peak = (statistics.median(r[key] for r in results) for key in ("first", "step", "peak"))
        read = statistics.median(
            limit["read"] for key, kept in limits.items() if key[1] == point.dtype for limit in kept
        )
        moved = step_bytes(HALF, dtype=point.dtype, batch=point.batch, length=point.prompt + NEW / 2)
        cells = [point.batch * point.prompt / first, point.batch / step, moved / step / read, peak / 1e9]
        lines.append(table_row([name, *point, *map(shown, cells)]))
    return "\n".join(lines)


def demands(found: Found) -> tuple[str, bool]:
    """The second table: what is demanded and what was reached; and whether nothing measured falls short."""
    lines = [table_row(["ratio", "must", "reached", ""]), table_row(["---"] * 4)]
    kept = True
    for demand in DEMANDS:
        value = reached(found, demand)
        met = value is None or value >= demand.least
        kept &= met
        verdict = "not measured" if value is None else "kept" if met else "short"
        lines.append(table_row([demand.text, demand.least, "" if value is None else shown(value), verdict]))
    again = [
        result["compilations"] for key, results in found.items() if key[0] == FLAX.name for result in results if result
    ]
    if again:
        kept &= max(again) == 0
        verdict = "short" if max(again) else "kept"
        lines.append(table_row(["flax: compilations after the first call", 0, max(again), verdict]))
    return "\n".join(lines), kept


def page(arguments: argparse.Namespace, found: Found, limits: Limits) -> tuple[str, bool]:
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
{NEW} new tokens, greedy, medians of {arguments.rounds} interleaved rounds, each program in a process of its own.
{machine()}; {made_by}.
A prompt's tokens a second are over the time to the first new one; of read is how much of what the memory gives a step
reads of weights and cache. Repeat: `python -m benchmarks.compare --write` with the peers' Pythons.

{table(found, limits)}

Limits in the same run: streaming read {statistics.median(reads):.0f} GB/s ({min(reads):.0f} to {max(reads):.0f});
large matrix products: {allowed}.

## What is demanded

Ratios of tokens a second within a round, their median; of two settings of a peer the better counts.

{second}
"""
    return text, kept


def numbers(text: str) -> list[int]:
    """Numbers given with commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", type=listed, default=list(BYTES))
    parser.add_argument("--batch", type=numbers, default=list(BATCHES))
    parser.add_argument("--prompt", type=numbers, default=list(PROMPTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=listed, help="families, as the ratios name them")
    for name in PYTHONS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PY", help="a Python that has it")
    parser.add_argument("--write", action="store_true", help=f"keep the page in benchmarks/results, in {RESULT}")
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
