"""Loading a 7B-shaped bfloat16 checkpoint: time against reading the same bytes, peak memory against the weights.

    python -m benchmarks.load_7b [--directory DIR] [--backends torch,flax,tf] [--runs 3] [--quantization int4] [--write]

Makes 14.5 GB of random weights in DIR the first time (kept: delete it yourself). Each load is a process of its own,
with the file out of the page cache, between two plain reads of it into memory (numpy.fromfile) in the same state; the
limit is their mean plus the framework's import. Skimming, through one small buffer, tells the disk from the memory.
With a quantization each matrix is packed as it comes, and a few tokens are generated; the limit is the reading and the
arithmetic, which is measured by packing random matrices of each shape in the same run, and the peaks are those asked.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

from mistral_core.backend import POLITE
from mistral_core.config.presets import PRESETS
from mistral_core.parameters import shapes
from mistral_core.quantization import request
from mistral_core.weights.checkpoint import save

from .common import keep

CONFIG = PRESETS["mistral-7b-v0.1"]
NUMBERS = sum(math.prod(shape) for shape in shapes(CONFIG, "MistralForCausalLM").values())
FRAMEWORKS = {"torch": "torch", "flax": "flax", "tf": "tensorflow"}
PACKED_GB = {"torch": 5.5, "flax": 5.5, "tf": 6.5}
"""The most memory that a load into 4 bits may take, generating included."""
PACKED_TIME = 1.5
MEMORY, TIME = 1.15, 1.3
"""The most a load may take, as a multiple of the weights and of reading the file plus the import."""

READ = """
import json, sys, time
import numpy as np
start = time.perf_counter()
held = [np.fromfile(path, np.uint8) for path in sys.argv[1:]]
print(json.dumps({"read": time.perf_counter() - start}))
"""

LOAD = """
import importlib, json, resource, sys, time
start = time.perf_counter()
package = importlib.import_module("mistral_" + sys.argv[1])
imported = time.perf_counter()
quantization = sys.argv[4] or None
model = package.MistralForCausalLM.from_pretrained(sys.argv[2], quantization=quantization)
loaded = time.perf_counter()
if quantization:
    model.generate([[1, 2, 3]], max_new_tokens=4, eos_token_id=None)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
assert model.num_parameters() == int(sys.argv[3])
print(json.dumps({"import": imported - start, "load": loaded - imported, "peak": peak}))
"""


def weights() -> Iterator[tuple[str, np.ndarray]]:
    """Random finite bfloat16 of either sign."""
    rng = np.random.default_rng(0)
    for name, shape in shapes(CONFIG, "MistralForCausalLM").items():
        bits = rng.integers(0, 2**16, shape, np.uint16)
        yield name, (bits & 0x80FF | 0x3C00).view(ml_dtypes.bfloat16)


def files(directory: Path) -> list[Path]:
    """The files that hold the weights."""
    return sorted(directory.glob("*.safetensors"))


def forget(directory: Path) -> None:
    """Drop the weights from the page cache, so that they come from the disk."""
    for path in files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def skim(directory: Path) -> float:
    """Seconds to read the weights from the disk into one small buffer, again and again."""
    forget(directory)
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    for path in files(directory):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def child(script: str, directory: Path, *arguments: str) -> dict[str, float]:
    """What a script prints in a fresh process, the weights out of the page cache."""
    forget(directory)
    environment = {**os.environ, **POLITE, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


def arithmetic(quantization: str) -> float:
    """Seconds that packing the matrices takes where nothing has to be read."""
    asked = request.given(quantization).resolved(CONFIG, "MistralForCausalLM")
    sizes = shapes(CONFIG, "MistralForCausalLM")
    wanted = [(name, sizes[name]) for name in asked.matrices(CONFIG, "MistralForCausalLM")]
    once: dict[tuple[int, ...], float] = {}
    for name, shape in wanted:
        if shape not in once:
            matrix = np.random.default_rng(0).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
            start = time.perf_counter()
            asked.quantise(name, matrix)
            once[shape] = time.perf_counter() - start
    return sum(once[shape] for _, shape in wanted)


def measure(backend: str, directory: Path, quantization: str) -> dict[str, float]:
    """One load between two reads."""
    paths = [str(path) for path in files(directory)]
    before = child(READ, directory, *paths)["read"]
    found = child(LOAD, directory, backend, str(directory), str(NUMBERS), quantization)
    reading = (before + child(READ, directory, *paths)["read"]) / 2
    size = sum(path.stat().st_size for path in files(directory))
    return {
        **found,
        "read": reading,
        "skim": skim(directory),
        "arithmetic": (packing := arithmetic(quantization) if quantization else 0.0),
        "time ratio": (found["import"] + found["load"]) / (reading + found["import"] + packing),
        "memory ratio": found["peak"] / size,
    }


def row(backend: str, runs: list[dict[str, float]]) -> str:
    """A line of the table: medians."""
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    name = FRAMEWORKS[backend]
    return (
        f"| {name} {version(name)} | {middle['import']:.1f} | {middle['skim']:.1f} | {middle['read']:.1f} "
        f"| {middle['arithmetic']:.1f} | {middle['load']:.1f} "
        f"| {middle['time ratio']:.2f} | {middle['peak'] / 1e9:.2f} | {middle['memory ratio']:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("build/random-7b"))
    parser.add_argument("--backends", default=",".join(FRAMEWORKS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quantization", default="", help="int8, int4 or nf4: on the fly, and a few tokens")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    quantization = arguments.quantization
    if not files(arguments.directory):
        arguments.directory.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing 14.5 GB to {arguments.directory}", file=sys.stderr)
        save(arguments.directory, CONFIG, weights())
    rows, kept = [], True
    for backend in arguments.backends.split(","):
        runs = [measure(backend, arguments.directory, quantization) for _ in range(arguments.runs)]
        rows.append(row(backend, runs))
        print(rows[-1], flush=True)
        size = sum(path.stat().st_size for path in files(arguments.directory))
        memory = PACKED_GB[backend] * 1e9 / size if quantization else MEMORY
        kept &= statistics.median(run["memory ratio"] for run in runs) <= memory
        kept &= statistics.median(run["time ratio"] for run in runs) <= (PACKED_TIME if quantization else TIME)
    size = sum(path.stat().st_size for path in files(arguments.directory)) / 1e9
    table = "\n".join(
        [
            "| framework | import s | skim s | read s | arithmetic s | load s "
            f"| time (limit {PACKED_TIME if quantization else TIME}) | peak GB "
            f"| memory{'' if quantization else f' (limit {MEMORY})'} |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    if arguments.write:
        name = f"load_7b_{quantization}.md" if quantization else "load_7b.md"
        how = f" into {quantization}" if quantization else ""
        option = f" --quantization {quantization}" if quantization else ""
        keep(
            name,
            f"# Loading a 7B-shaped bfloat16 checkpoint{how}\n\n`python -m benchmarks.load_7b{option} --write`: Python "
            f"{platform.python_version()}, {os.cpu_count()} CPU cores, medians of {arguments.runs}, each load in a "
            f"fresh process from the disk, between two plain reads (numpy.fromfile) of the same {size:.1f} GB. "
            "Skimming reads them through one small buffer: the rest of the time is the system's, for fresh memory. "
            "Arithmetic is packing without reading. Time is (import + load) / (import + read + arithmetic), memory the "
            f"process' peak / the file, generating a few tokens included where matrices are packed.\n\n{table}\n",
        )
    print(table)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
