"""Whether anything has become slower: ratios of a short run beside those kept of the same kind of processor.

    python -m benchmarks.guard [--backend torch,flax,tf] [--rounds 2] [--write]

Never times, which no two machines share, but ratios of what was measured within seconds in one process: decoding over
the reading of as many bytes, the prompt over a large product, four and sixteen rows over one, packed weights over
bfloat16; of each the median over all rounds. A backend that falls behind another one falls in its own ratios. Names
each that is below what benchmarks/results/guard.json has by more than a share, and then exits with 1. A kind of
processor is its vendor, what it computes with, and how many cores share the memory. A processor that is shared with
others reads memory two and three times as fast as an hour before, which moves every ratio: runs are kept by how many
operations of a large product are done while a byte is read, in float32 and in bfloat16, and the nearest one is
compared; where none is near, `--write` keeps this one. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .common import RESULTS, listed, measure, processor, report, shown, table_row, vendor, versions
from .decode import HALF, prompt_operations, step_bytes, task
from .peers.limits import K, M, N

FELL = 0.15
"""The share by which a ratio may be below the one that is kept."""
SMALL = HALF.replace(num_hidden_layers=2, vocab_size=8192)
"""Layers as large as those of half, whose weights no cache of a processor holds, and few of them."""
FLOATS, PACKED, BATCHES = ("float32", "bfloat16"), ("int8", "int4"), (1, 4, 16)
PROMPT, NEW, CALLS = 128, 16, 5
FEATURES = {
    "AMX": ("amx_bf16",),
    "AVX-512": ("avx512f",),
    "AVX2": ("avx2",),
    "SVE": ("sve",),
    "bfloat16": ("avx512_bf16", "bf16"),
}
"""What a processor computes with -> the flags of Linux that say so."""
PRODUCT = 2 * M * K * N
BALANCES = {dtype: f"{dtype}: operations / byte" for dtype in FLOATS}
"""dtype -> the name of how many operations of a large product are done while a byte is read."""
NEAR = 1.4
"""The factor within which two balances are the same."""
KEPT = RESULTS / "guard.json"


class Fallen(NamedTuple):
    """A ratio that is lower than it was."""

    backend: str
    name: str
    kept: float
    now: float


def kind(cpuinfo: str | None, cores: int) -> str:
    """The kind of a processor, from what /proc/cpuinfo says of this one, or is said to say."""
    facts = processor(cpuinfo)
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    found = [name for name, any_of in FEATURES.items() if flags.intersection(any_of)]
    if "AVX-512" in found:
        found.remove("AVX2")
    return ", ".join([vendor(facts), *found, f"{cores} cores"])


def here() -> str:
    """The kind of this processor."""
    return kind(None, os.cpu_count() or 1)


def moved(dtype: str) -> int:
    """The bytes that a step of one row moves, and that are read beside it."""
    return round(step_bytes(SMALL, dtype=dtype, batch=1, length=PROMPT + NEW / 2))


def ratios(one: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of one round of a backend, and its balances."""
    made = {}
    for dtype in FLOATS:
        alone, read = one[f"{dtype} 1"], one[f"read beside {dtype}"]
        made[BALANCES[dtype]] = PRODUCT / one[f"matmul {dtype}"] / (moved(dtype) / read)
        made[f"{dtype}: decode / read"] = read / alone["step"]
        operations = prompt_operations(SMALL, batch=1, prompt=PROMPT) / alone["first"]
        made[f"{dtype}: prompt / matmul"] = operations / (PRODUCT / one[f"matmul {dtype}"])
        for batch in BATCHES[1:]:
            together = batch * alone["step"] / one[f"{dtype} {batch}"]["step"]
            made[f"{dtype}: decode, batch {batch} / 1"] = together
    for scheme in PACKED:
        made[f"{scheme}: decode / bfloat16"] = one["bfloat16 1"]["step"] / one[f"{scheme} 1"]["step"]
    return made


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each ratio the median over the rounds."""
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def is_near(kept: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether two runs have the same balances."""
    return _apart(kept, now) <= NEAR


def _apart(kept: Mapping[str, float], now: Mapping[str, float]) -> float:
    """The largest factor between balances that two runs have both."""
    both = [(kept[name], now[name]) for name in BALANCES.values() if name in kept and name in now]
    return max(max(pair) / min(pair) for pair in both)


def nearest(runs: Sequence[Mapping[str, Any]], now: Mapping[str, float]) -> dict[str, float]:
    """The kept ratios of the nearest balances; none where none is near."""
    near = [run["ratios"] for run in runs if is_near(run["ratios"], now)]
    return min(near, key=lambda kept: _apart(kept, now), default={})


def fallen(backend: str, kept: Mapping[str, float], now: Mapping[str, float]) -> list[Fallen]:
    """What is below what was kept by more than the share that is let pass."""
    both = [
        Fallen(backend, name, value, now[name])
        for name, value in kept.items()
        if name in now and name not in BALANCES.values()
    ]
    return [each for each in both if each.now < (1 - FELL) * each.kept]


def measured(arguments: argparse.Namespace, scratch: str) -> tuple[dict[str, list[dict[str, float]]], str]:
    """The ratios of every round of each backend, and the versions of what made them; their processes in turn."""
    reads = {dtype: moved(dtype) for dtype in FLOATS}
    asked = task(SMALL, prompt=PROMPT, new=NEW, calls=CALLS, models=(*FLOATS, *PACKED), batches=BATCHES, reads=reads)
    found: dict[str, list[dict[str, float]]] = {}
    results = []
    for number, backend in itertools.product(range(arguments.rounds), arguments.backend):
        report(f"round {number + 1}: {backend}")
        results.append(measure("guard", {**asked, "options": {"backend": backend}}, scratch=scratch))
        found.setdefault(backend, []).extend(map(ratios, results[-1]["rounds"]))
    return found, versions(results)


def told(backend: str, kept: Mapping[str, float], rounds: Sequence[Mapping[str, float]]) -> list[str]:
    """The rows of a backend: each ratio with the middle half of its rounds, the kept one, and whether it fell."""
    now, lines = medians(rounds), []
    fell = {each.name for each in fallen(backend, kept, now)}
    for name, value in now.items():
        before, each = kept.get(name), sorted(one[name] for one in rounds)
        cells = ["", ""] if before is None else [shown(before), f"{value / before:.2f}"]
        span = f"{shown(each[len(each) // 4])} to {shown(each[-1 - len(each) // 4])}"
        row = [f"{backend} {name}", cells[0], shown(value), cells[1], span, "FELL" if name in fell else ""]
        lines.append(table_row(row))
    return lines


def compared(
    everything: Mapping[str, Any], processor: str, rounds: Mapping[str, Sequence[Mapping[str, float]]]
) -> tuple[str, int]:
    """What is said, and the exit status: 1 where something fell."""
    table = [table_row(["ratio", "kept", "now", "of kept", "middle half", ""]), table_row(["---"] * 6)]
    said, fell = [], []
    for backend, each in rounds.items():
        now, runs = medians(each), everything.get(processor, {}).get(backend, [])
        kept = nearest(runs, now)
        table += told(backend, kept, each)
        fell += fallen(backend, kept, now)
        said += [f"not measured: {backend} {name}" for name in kept if name not in now]
        if not kept:
            balances = "; ".join(balance(run["ratios"]) for run in runs)
            have = f"of this kind of processor only at {balances}" if runs else "none of this kind of processor"
            said.append(
                f"{backend} ({processor}): no ratios near {balance(now)} to compare, {have}; "
                f"`python -m benchmarks.guard --write` keeps those of a run on a quiet machine."
            )
    lines = [f"fell by more than {FELL:.0%}: {e.backend} {e.name}: {e.kept:.3g} -> {e.now:.3g}" for e in fell]
    verdict = lines or [f"{processor}: nothing that was compared fell by more than {FELL:.0%}."]
    return "\n".join([*table, "", *said, *verdict]) + "\n", int(bool(fell))


def balance(run: Mapping[str, float]) -> str:
    """The balances of a run, as they are said."""
    return ", ".join(f"{shown(run[name])} {name}" for name in BALANCES.values() if name in run)


def with_run(runs: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kept runs of a backend, one in place of those of the same balances."""
    others = [each for each in runs if not is_near(each["ratios"], run["ratios"])]
    return sorted([*others, run], key=lambda each: each["ratios"][BALANCES["float32"]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the ratios of this run for this kind of processor")
    arguments = parser.parse_args()
    everything = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        rounds, made_by = measured(arguments, scratch)
    text, status = compared(everything, here(), rounds)
    print(text, end="")
    if not arguments.write:
        return status
    about = {"date": datetime.date.today().isoformat(), "versions": made_by}
    kept = everything.setdefault(here(), {})
    for backend, each in rounds.items():
        now = {name: float(f"{value:.4g}") for name, value in medians(each).items()}
        kept[backend] = with_run(kept.get(backend, []), {**about, "ratios": now})
    KEPT.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
