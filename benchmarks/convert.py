"""Conversion against `cp` of the same bytes on the same disk, in turn in one run, and its peak memory.

    python -m benchmarks.convert [--formats raw,flax-msgpack,...] [--runs 3] [--directory DIR] [--write]

The source is a random bfloat16 checkpoint of 1.1 GB; tf-h5 has it in float32. cp copies what the conversion wrote, so
both write the same bytes to the same files, and both end with them on the disk: cp is followed by `sync` of its files,
as a conversion syncs before it swaps. Plain cp is told too. The limit of memory is 3 x the largest tensor + 200 MB.
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
from mistral_core.weights.opening import Checkpoint

from .common import ROOT, keep, random_weights

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
formats.format_named(sys.argv[3])
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
        subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
    return time.perf_counter() - start


def converted(source: Path, target: Path, format: str, verify: str) -> tuple[float, float]:
    """Seconds, and bytes of memory beyond what the imports take."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, str(source), str(target), format, verify]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    return float(out[0]), float(out[1])


def written_bytes(directory: Path) -> tuple[int, int]:
    """Bytes of its files, and of memory that writing them may take."""
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    checkpoint = Checkpoint.open(directory)
    stored = (info for file in checkpoint.shards.values() for info in file.tensors.values())
    return size, 3 * max(tensor.nbytes for tensor in (*checkpoint.tensors.values(), *stored)) + 200_000_000


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name, row in formats.FORMATS.items() if row.written]
    parser.add_argument("--formats", default=",".join(every))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "convert")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    source, target = make(options.directory / "source"), options.directory / "target"
    written = options.directory / "written"
    lines = [
        "| format | MB | cp MB/s | cp, sync MB/s | off MB/s | of cp | hashes MB/s | of cp | peak MB | limit MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for format in options.formats.split(","):
        converted(source, written, format, "off")
        size, limit = written_bytes(written)
        seconds: dict[str, list[float]] = {"cp": [], "cp, sync": [], "off": [], "hashes": []}
        shares: dict[str, list[float]] = {verify: [] for verify in WANTED}
        peak = 0.0
        for _ in range(options.runs):
            for verify in WANTED:
                copy = copied(written, target, synced=True)
                took, memory = converted(source, target, format, verify)
                seconds["cp, sync"].append(copy)
                seconds[verify].append(took)
                shares[verify].append(copy / took)
                peak = max(peak, memory)
        for _ in range(options.runs):  # apart: what it leaves to be written would slow the others
            seconds["cp"].append(copied(written, target, synced=False))
        os.sync()
        speed = {way: size / statistics.median(times) / 1e6 for way, times in seconds.items()}
        cells = [f"{speed[verify]:.0f} | {statistics.median(shares[verify]):.2f}" for verify in WANTED]
        lines.append(
            f"| {format} | {size / 1e6:.0f} | {speed['cp']:.0f} | {speed['cp, sync']:.0f} | {' | '.join(cells)} "
            f"| {peak / 1e6:.0f} | {limit / 1e6:.0f} |"
        )
        print(lines[-1], flush=True)
        shutil.rmtree(written)
    shutil.rmtree(target, ignore_errors=True)
    about = (__doc__ or "").splitlines()[4:7]
    text = "\n".join(
        [
            "# Conversion against cp",
            "",
            *about,
            f"Medians of {options.runs} runs, each beside its own cp, {os.cpu_count()} CPU cores. Demanded: "
            f"{WANTED['off']} of cp with verification off, {WANTED['hashes']} with hashes. "
            "Repeat: `python -m benchmarks.convert --write`.",
            "",
            *lines,
        ]
    )
    print(text)
    if options.write:
        keep("convert.md", text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
