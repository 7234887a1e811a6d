"""What every program that generates is measured with; standard library and NumPy alone, for the peers' Pythons too.

A program is `python -m benchmarks.peers.NAME TASK`: TASK is JSON, what it prints last is one line of JSON. A task has
the sizes of the model, dtype, batch, prompt, new (tokens), calls (after the one that compiles) and options of its own.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mistral_core import backend

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
"""Who made a processor, as Linux says it, and in short."""
POLITE = {**backend.POLITE, "TF_CPP_MIN_LOG_LEVEL": "3"}

# In the child


class Stamps:
    """A streamer that notes when each value came, and the memory until then; the first value is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peaks: list[int] = []

    def put(self, value: Any) -> None:
        """One value, awaited."""
        np.asarray(value)
        self.times.append(time.perf_counter())
        self.peaks.append(peak_memory())

    def end(self) -> None:
        """Nothing: the last value has been noted."""

    @property
    def steps(self) -> np.ndarray:
        """Seconds between new tokens."""
        return np.diff(self.times[1:])


def task() -> dict[str, Any]:
    """What this process was asked to measure."""
    return json.loads(sys.argv[1])


def prompt_ids(asked: dict[str, Any]) -> np.ndarray:
    """Random ids [B, T] int64."""
    vocabulary = asked["sizes"]["vocab_size"]
    return np.random.default_rng(0).integers(3, vocabulary, (asked["batch"], asked["prompt"]))


def random_weights(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Numbers of either sign, 1/128 to 1/64 in size, the same in both dtypes: float32, or the bits of bfloat16."""
    bits = rng.integers(0, 2**16, shape, np.uint16) & 0x80FF | 0x3C00
    return bits if dtype == "bfloat16" else (bits.astype(np.uint32) << 16).view(np.float32)


def peak_memory() -> int:
    """The most bytes this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def streamed(generate: Callable[[Stamps], Any], calls: int) -> dict[str, float]:
    """Time to first token, a step and compilation, of a program with streamers: medians over calls after the first."""
    totals, first, step = [], [], []
    for _ in range(calls + 1):
        stamps, start = Stamps(), time.perf_counter()
        generate(stamps)
        totals.append(time.perf_counter() - start)
        first.append(stamps.times[1] - start)
        step.append(statistics.median(stamps.steps))
    return _result(first[1:], step[1:], totals[0] - statistics.median(totals[1:]))


def differenced(generate: Callable[[int], Any], new: int, calls: int) -> dict[str, float]:
    """The same of a program without streamers: what 1 token costs, and what each further one of `new` adds."""
    cold = timed(generate, new) + timed(generate, 1)
    one, all_ = [], []
    for _ in range(calls):
        all_.append(timed(generate, new))
        one.append(timed(generate, 1))
    step = (statistics.median(all_) - statistics.median(one)) / (new - 1)
    return _result(one, [step], cold - statistics.median(all_) - statistics.median(one))


def _result(first: list[float], step: list[float], compiling: float) -> dict[str, float]:
    return {
        "first": statistics.median(first),
        "step": statistics.median(step),
        "compile": max(compiling, 0.0),
        "peak": peak_memory(),
    }


def say(result: dict[str, Any], *packages: str) -> None:
    """Print the result, with the versions of what made it."""
    print(json.dumps({**result, "versions": {name: version(name) for name in packages}}))


# In the parent


class MeasurementError(Exception):
    """A program that printed no result."""


def measure(program: str, asked: dict[str, Any], *, python: str = sys.executable, scratch: str) -> dict[str, Any]:
    """The result of a program in a fresh process; `scratch` keeps what compilers keep, for this run alone."""
    environment = {**os.environ, **POLITE, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": scratch}
    command = [python, "-m", f"benchmarks.peers.{program}", json.dumps(asked)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MeasurementError(f"{program}: exit {done.returncode}: {last}")
    return json.loads(lines[-1])


def middle(results: list[dict[str, Any]], key: str) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(result[key] for result in results)


def processor(cpuinfo: str | None = None) -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor, or of what is given in its place; nothing where there is none."""
    path, facts = Path("/proc/cpuinfo"), dict[str, str]()
    if cpuinfo is None:
        cpuinfo = path.read_text() if path.exists() else ""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def vendor(facts: dict[str, str]) -> str:
    """Who made a processor, or what machine it is."""
    name = facts.get("vendor_id", platform.machine())
    return VENDORS.get(name, name)


def machine() -> str:
    """Python, cores and processor, in a sentence's part."""
    name = processor().get("model name") or platform.processor() or platform.machine()
    return f"Python {platform.python_version()}, {os.cpu_count()} CPU cores ({name}, {platform.machine()})"


def table_row(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def shown(value: Any) -> str:
    """A cell: three digits of a fraction, all of those before the point."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def versions(results: Iterable[dict[str, Any]]) -> str:
    """Every package that measured, once."""
    return ", ".join(sorted({f"{name} {number}" for row in results for name, number in row["versions"].items()}))


def report(text: str) -> None:
    """Say on stderr what is being done."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


def listed(text: str) -> list[str]:
    """A list given with commas."""
    return text.split(",")


def keep(name: str, text: str) -> None:
    """Write a page of results, beside those of processors of the same vendor."""
    directory = RESULTS / vendor(processor()).lower()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
