"""Conversion against `cp` of the same bytes on the same disk, in turn in one run, and its peak memory.

    python -m benchmarks.convert [--formats raw,flax-msgpack,...] [--runs 3] [--directory DIR] [--write]

The source is a random bfloat16 checkpoint of 1.1 GB, its largest tensor 131 MB. Both sides end with the bytes on the
disk: cp is followed by `sync` of what it wrote, as a conversion syncs before it swaps. Plain cp is told too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from mistral_core.config import MistralConfig
from mistral_core.parameters import shapes
from mistral_core.weights import formats
from mistral_core.weights.checkpoint import save

from .common import RESULTS, ROOT, random_weights

CONFIG = MistralConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=7168, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=4, head_dim=128, max_position_embeddings=4096, sliding_window=None, rope_theta=1e6,
)  # fmt: skip
WANTED = {"off": 0.6, "hashes": 0.35}
"""The least share of cp's throughput, by verification."""

CHILD = """
import sys, time
from mistral_core.weights import convert as module, formats
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
formats.module_of(sys.argv[3])
base = peak()
start = time.perf_counter()
report = module.convert(sys.argv[1], sys.argv[2], to=sys.argv[3], verify=sys.argv[4], overwrite=True, allow_lossy=True)
seconds = time.perf_counter() - start
print(seconds, (peak() - base) * 1024)
"""


def make(directory: Path) -> Path:
    """The source, made once."""
    if not directory.exists():
        rng = np.random.default_rng(0)
        tensors = (
            (name, random_weights(shape, "bfloat16", rng).view(ml_dtypes.bfloat16))
            for name, shape in shapes(CONFIG, "MistralForCausalLM").items()
        )
        save(directory, CONFIG, tensors)
    return directory


def copied(source: Path, target: Path, *, synced: bool) -> float:
    """Seconds that cp takes."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    if synced:
        subprocess.run(["sync", *target.iterdir()], check=True)
    return time.perf_counter() - start


def converted(source: Path, target: Path, format: str, verify: str) -> tuple[float, float]:
    """Seconds, and bytes of memory beyond what the imports take."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, str(source), str(target), format, verify]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    return float(out[0]), float(out[1])


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    written = [name for name, row in formats.FORMATS.items() if row.written]
    parser.add_argument("--formats", default=",".join(written))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "convert")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    source, target = make(options.directory / "source"), options.directory / "target"
    size = sum(path.stat().st_size for path in source.iterdir())
    largest = max(np.prod(shape) for shape in shapes(CONFIG, "MistralForCausalLM").values()) * 2
    lines = [
        "| format | MB/s off | / cp | MB/s hashes | / cp | peak MB | limit MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    plain, synced = [], []
    for format in options.formats.split(","):
        seconds: dict[str, list[float]] = {"off": [], "hashes": []}
        copies, peak = [], 0.0
        for _ in range(options.runs):
            plain.append(copied(source, target, synced=False))
            for verify, times in seconds.items():
                copies.append(copied(source, target, synced=True))
                took, memory = converted(source, target, format, verify)
                times.append(took)
                peak = max(peak, memory)
        synced += copies
        copy = statistics.median(copies)
        cells = [
            f"{size / statistics.median(t) / 1e6:.0f} | {copy / statistics.median(t):.2f}" for t in seconds.values()
        ]
        lines.append(f"| {format} | {' | '.join(cells)} | {peak / 1e6:.0f} | {(3 * largest + 200e6) / 1e6:.0f} |")
        print(lines[-1], flush=True)
    shutil.rmtree(target, ignore_errors=True)
    about = (__doc__ or "").splitlines()[4:7]
    text = "\n".join(
        [
            "# Conversion against cp",
            "",
            *about,
            f"cp and sync: {size / statistics.median(synced) / 1e6:.0f} MB/s, cp alone into the page cache: "
            f"{size / statistics.median(plain) / 1e6:.0f} MB/s; {size / 1e6:.0f} MB, medians of {options.runs} runs, "
            f"{os.cpu_count()} CPU cores. Demanded: {WANTED['off']} of cp with verification off, "
            f"{WANTED['hashes']} with hashes. Repeat: `python -m benchmarks.convert --write`.",
            "",
            *lines,
        ]
    )
    print(text)
    if options.write:
        (RESULTS / "convert.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
