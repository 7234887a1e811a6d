"""Layers in a scan against layers in turn: what compiling and running cost as the depth grows.

    python -m benchmarks.flax_scan [--write]

Each row compiles the loss and its gradients of one model both ways, one after the other, from shapes; times are of
this machine at that moment, so read the ratios.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from mistral_core.config.presets import TINY
from mistral_flax import MistralForCausalLM
from mistral_flax.scan import scan_layers

from .common import keep

DEPTHS = (4, 8, 16, 32)
CONFIG = TINY.replace(
    vocab_size=1024, hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    sliding_window=64,
)  # fmt: skip
SHAPE = (2, 128)
RESULT = "flax_scan.md"


def measure(model: MistralForCausalLM) -> dict[str, float]:
    """Lines of the program, seconds to trace and to compile it, MB of temporaries, milliseconds of a run."""
    ids = jnp.ones(SHAPE, jnp.int32)
    gradients = jax.jit(jax.value_and_grad(lambda params, ids: model(ids, params=params, labels=ids).loss))
    start = time.perf_counter()
    lowered = gradients.lower(model.params, ids)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    runs = [timed(compiled, model.params, ids) for _ in range(6)][1:]
    return {
        "lines": len(lowered.as_text().splitlines()),
        "trace": traced - start,
        "compile": done - traced,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "run": 1e3 * statistics.median(runs),
    }


def timed(function: Any, *arguments: Any) -> float:
    """Seconds of one call, its results awaited."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| layers | program, lines | trace, s | compile, s | compile, ratio | temporaries, MB | run, ms | run, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for depth in DEPTHS:
        model = MistralForCausalLM(CONFIG.replace(num_hidden_layers=depth))
        turn = measure(model)
        scan = measure(scan_layers(model))
        cells = [
            *(f"{turn[name]:.{digits}f} / {scan[name]:.{digits}f}" for name, digits in (("lines", 0), ("trace", 1))),
            f"{turn['compile']:.1f} / {scan['compile']:.1f}",
            f"{turn['compile'] / scan['compile']:.1f}",
            f"{turn['temporaries']:.0f} / {scan['temporaries']:.0f}",
            f"{turn['run']:.0f} / {scan['run']:.0f}",
            f"{turn['run'] / scan['run']:.2f}",
        ]
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep the table in benchmarks/results, in {RESULT}")
    arguments = parser.parse_args()
    measure(MistralForCausalLM(CONFIG.replace(num_hidden_layers=1)))  # what is slow once
    text = f"""# Layers in a scan

Loss and gradients of a Mistral with hidden size {CONFIG.hidden_size}, batch and length {SHAPE}, float32: layers in
turn / in a scan; a ratio above 1 is the scan's advantage.
jax {jax.__version__}, flax {version("flax")}, {jax.default_backend()}, {platform.machine()}.
Repeat: `python -m benchmarks.flax_scan --write`.

{table()}
"""
    if arguments.write:
        keep(RESULT, text)


if __name__ == "__main__":
    main()
