"""Whether anything has become slower: ratios of a short run beside those kept of the same kind of processor.

    python -m benchmarks.guard [--backend torch,flax,tf] [--rounds 2] [--write]

Never times, which no two machines share, but ratios of what was measured within seconds in one process: decoding over
the read bandwidth, the prompt over a large product, four and sixteen rows over one, packed weights over bfloat16; of
each the median over all rounds. A backend that falls behind another one falls in its own ratios. Names each that is
below what benchmarks/results/guard.json has by more than a share, and then exits with 1. A kind of processor is its
vendor, what it computes with, and how many cores share the memory; of one that has no ratios yet, `--write` keeps those
of this run. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .common import RESULTS, listed, measure, report, shown, table_row, versions
from .decode import HALF, prompt_operations, step_bytes, task
from .peers.limits import READ, K, M, N

FELL = 0.15
"""The share by which a ratio may be below the one that is kept."""
SMALL = HALF.replace(num_hidden_layers=2, vocab_size=8192)
"""Layers as large as those of half, whose weights no cache of a processor holds, and few of them."""
MODELS, BATCHES = ("float32", "bfloat16", "int8", "int4"), (1, 4, 16)
PROMPT, NEW, CALLS = 128, 16, 5
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
FEATURES = {
    "AMX": ("amx_bf16",),
    "AVX-512": ("avx512f",),
    "AVX2": ("avx2",),
    "SVE": ("sve",),
    "bfloat16": ("avx512_bf16", "bf16"),
}
"""What a processor computes with -> the flags of Linux that say so."""
PRODUCT = 2 * M * K * N
KEPT = RESULTS / "guard.json"


class Fallen(NamedTuple):
    """A ratio that is lower than it was."""

    name: str
    kept: float
    now: float


def kind(cpuinfo: str, cores: int) -> str:
    """The kind of a processor, from what /proc/cpuinfo says of it."""
    facts = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    vendor = facts.get("vendor_id", platform.machine())
    found = [name for name, any_of in FEATURES.items() if flags.intersection(any_of)]
    if "AVX-512" in found:
        found.remove("AVX2")
    return ", ".join([VENDORS.get(vendor, vendor), *found, f"{cores} cores"])


def here() -> str:
    """The kind of this processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return kind(cpuinfo.read_text() if cpuinfo.exists() else "", os.cpu_count() or 1)


def ratios(backend: str, one: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of one round of a backend."""
    made: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        alone = one[f"{dtype} 1"]
        moved = step_bytes(SMALL, dtype=dtype, batch=1, length=PROMPT + NEW / 2)
        made[f"{backend} {dtype}: decode / read"] = moved / alone["step"] / (READ / one[f"read beside {dtype}"])
        operations = prompt_operations(SMALL, batch=1, prompt=PROMPT) / alone["first"]
        made[f"{backend} {dtype}: prompt / matmul"] = operations / (PRODUCT / one[f"matmul {dtype}"])
        for batch in BATCHES[1:]:
            together = batch * alone["step"] / one[f"{dtype} {batch}"]["step"]
            made[f"{backend} {dtype}: decode, batch {batch} / 1"] = together
    for scheme in MODELS[2:]:
        made[f"{backend} {scheme}: decode / bfloat16"] = one["bfloat16 1"]["step"] / one[f"{scheme} 1"]["step"]
    return made


def medians(rounds: Mapping[str, list[float]]) -> dict[str, float]:
    """Of each ratio the median over the rounds."""
    return {name: statistics.median(values) for name, values in rounds.items()}


def fallen(kept: Mapping[str, float], now: Mapping[str, float]) -> list[Fallen]:
    """What is below what was kept by more than the share that is let pass."""
    both = [Fallen(name, value, now[name]) for name, value in kept.items() if name in now]
    return [each for each in both if each.now < (1 - FELL) * each.kept]


def measured(arguments: argparse.Namespace, scratch: str) -> tuple[dict[str, list[float]], str]:
    """Each ratio of every round, and the versions of what made them; processes of the backends in turn."""
    asked = task(SMALL, prompt=PROMPT, new=NEW, calls=CALLS, models=MODELS, batches=BATCHES)
    found: dict[str, list[float]] = {}
    results = []
    for number, backend in itertools.product(range(arguments.rounds), arguments.backend):
        report(f"round {number + 1}: {backend}")
        results.append(measure("guard", {**asked, "options": {"backend": backend}}, scratch=scratch))
        for one in results[-1]["rounds"]:
            for name, value in ratios(backend, one).items():
                found.setdefault(name, []).append(value)
    return found, versions(results)


def told(kept: Mapping[str, float], rounds: Mapping[str, list[float]]) -> str:
    """The table: each ratio with the middle half of its rounds, the kept one, and whether it fell."""
    now = medians(rounds)
    fell = {each.name for each in fallen(kept, now)}
    lines = [table_row(["ratio", "kept", "now", "of kept", "middle half", ""]), table_row(["---"] * 6)]
    for name, value in now.items():
        before, each = kept.get(name), sorted(rounds[name])
        cells = ["", ""] if before is None else [shown(before), f"{value / before:.2f}"]
        span = f"{shown(each[len(each) // 4])} to {shown(each[-1 - len(each) // 4])}"
        lines.append(table_row([name, cells[0], shown(value), cells[1], span, "FELL" if name in fell else ""]))
    return "\n".join(lines)


def compared(everything: Mapping[str, Any], processor: str, rounds: Mapping[str, list[float]]) -> tuple[str, int]:
    """What is said, and the exit status: 1 where something fell."""
    kept = everything.get(processor, {}).get("ratios", {})
    text, now = told(kept, rounds), medians(rounds)
    if not kept:
        known = "; ".join(everything) or "none"
        said = f"There are no ratios of this kind of processor ({processor}), only of: {known}."
        how = f"`python -m benchmarks.guard --write` keeps those of a run on a quiet machine in results/{KEPT.name}."
        return f"{text}\n\n{said}\n{how}\n", 0
    fell = fallen(kept, now)
    lines = [f"fell by more than {FELL:.0%}: {each.name}: {each.kept:.3g} -> {each.now:.3g}" for each in fell]
    lines += [f"not measured: {name}" for name in kept if name not in now]
    verdict = "\n".join(lines) or f"Nothing fell by more than {FELL:.0%}."
    return f"{text}\n\n{processor}: {verdict}\n", int(bool(fell))


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
    kept = {name: float(f"{value:.4g}") for name, value in medians(rounds).items()}
    about = {"date": datetime.date.today().isoformat(), "versions": made_by}
    KEPT.write_text(json.dumps({**everything, here(): {**about, "ratios": kept}}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
