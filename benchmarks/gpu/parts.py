"""The parts of the kit in the order of importance, what each is asked, and how one is run within its time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.common import POLITE, ROOT
from benchmarks.decode import task
from mistral_core import MistralConfig
from mistral_core.config.presets import PRESETS, TINY

LEAST = 15.0
"""Seconds under which no part is begun."""
ENDS = 5.0
"""Seconds before its limit at which a part that counts its own time ends."""
OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Variables by which a machine would change how precisely float32 is multiplied, or how much memory JAX takes."""


class Size(NamedTuple):
    """How large everything is."""

    config: MistralConfig
    prompt: int
    short: int
    """The prompt of several rows, and of packed weights."""
    new: int
    batches: tuple[int, ...]
    window: int
    lengths: tuple[int, ...]
    """Of texts whose attention is measured alone."""
    matmul: int
    """Rows and columns of the large product."""
    read: int
    """Bytes of the large read."""
    schemes: tuple[str, ...]
    """Of weights, bfloat16 beside those that are packed."""
    packed_layers: int
    """Of the model whose weights are packed, which are made on the host."""
    calls: int


SIZES = {
    "7b": Size(
        PRESETS["mistral-7b-v0.3"], 4096, 512, 64, (1, 8, 32), 4096, (4096, 8192, 16384, 32768), 8192, 1 << 32,
        ("bfloat16", "int4", "int8"), 8, 3,
    ),
    "tiny": Size(
        TINY.replace(num_hidden_layers=1), 64, 16, 8, (1,), 16, (32, 64), 256, 1 << 22, ("int4",), 1, 1
    ),
}  # fmt: skip


class Part(NamedTuple):
    """A process of its own."""

    group: str
    name: str
    options: dict[str, Any]
    limit: float
    """Seconds."""
    batch: int = 1

    @property
    def title(self) -> str:
        """What a reader calls it."""
        return f"{self.group}: {self.name}" if self.name else self.group


class Outcome(NamedTuple):
    """What a part gave, and why it gave no more."""

    part: Part
    rows: list[dict[str, Any]]
    problem: str = ""
    took: float = 0.0
    log: str = ""


def parts(size: Size) -> list[Part]:
    """All, the most important first."""
    programs = (("torch", "on", 120.0), ("transformers", "on", 100.0), ("flax", "auto", 100.0), ("torch", "off", 40.0))
    decode = [
        Part("decode", _named(program, how, f"batch {batch}"), _options(program, how), limit, batch)
        for batch in size.batches
        for program, how, limit in programs
        if how != "off" or batch == 1
    ]
    packed = [
        Part("packed", _named(program, how, weights), _options(program, how, weights), 60.0)
        for program, how in (("torch", "on"), ("flax", "auto"))
        for weights in size.schemes
    ]
    kernels = ("torch sdpa", "torch flex", "flax dot_product", "jax cudnn")
    attention = [Part("attention", name, {"implementation": name}, 40.0) for name in kernels]
    suites = [Part("conformance", name, {"backend": name}, 75.0) for name in ("torch", "flax")]
    alone, several = ([part for part in decode if (part.batch == 1) is one] for one in (True, False))
    return [Part("limits", "", {}, 45.0), *suites, *alone, *attention, *several, *packed]


def _named(program: str, how: str, what: str) -> str:
    return f"{program}, {what}" if how == "auto" else f"{program} compile={how}, {what}"


def _options(program: str, how: str, weights: str = "bfloat16") -> dict[str, Any]:
    return {"program": program, "compile": how, "weights": weights}


def prompt_of(part: Part, size: Size) -> int:
    """How many tokens a row's prompt has: one row has the long one, whose speed is a goal."""
    return size.prompt if part.batch == 1 and part.group == "decode" else size.short


def asked_of(part: Part, size: Size, device: str, limit: float) -> dict[str, Any]:
    """The task of a part."""
    if part.group in ("decode", "packed"):
        config, prompt = size.config, prompt_of(part, size)
        if part.group == "packed":
            config = config.replace(num_hidden_layers=min(config.num_hidden_layers, size.packed_layers))
        given = {"batch": part.batch, "prompt": prompt, "new": size.new, "calls": size.calls}
        return task(config, options=part.options, device=device, **given)
    heads = size.config.num_attention_heads, size.config.num_key_value_heads, size.config.head_dim
    return {
        "options": part.options, "device": device, "matmul": size.matmul, "read": size.read, "window": size.window,
        "lengths": size.lengths, "heads": heads, "seconds": limit - ENDS, "quick": device == "cpu",
    }  # fmt: skip


def run(part: Part, asked: dict[str, Any], limit: float, scratch: str) -> Outcome:
    """A part in a process of its own, which with all its helpers ends after `limit` seconds."""
    module = {"packed": "decode"}.get(part.group, part.group)
    environment = {name: value for name, value in os.environ.items() if name not in OVERRIDES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # which may bring packages
    environment |= {**POLITE, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": scratch}
    command = [sys.executable, "-m", f"benchmarks.gpu.{module}", json.dumps(asked)]
    started = time.perf_counter()
    child = subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=limit)
        problem = "" if child.returncode == 0 else told(err) or f"exit {child.returncode}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # compilers' helpers too
    if problem.startswith("stopped"):
        out, err = child.communicate()
    return Outcome(part, list(results(out)), problem, time.perf_counter() - started, err)


def results(out: str) -> Iterator[dict[str, Any]]:
    """The results among the lines that a part printed; a line that was cut off is none."""
    for line in out.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def told(err: str) -> str:
    """The line of a log that names its last error, or its last line."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (named or lines or [""])[-1][:200].replace("|", "/")
