"""Few rows times a matrix: the kernels in C beside what each framework does with floats, and how fast memory is read.

    python -m benchmarks.rows [--shape 7168,2048] [--rows 1,4,16] [--backend torch,flax,tf] [--repeats 7]
        [--cpu] [--write]

One process, all in turn in each round, medians. A number is GB/s of the bytes that are stored, so that twice as many of
bfloat16 as of int8 are one time; in brackets are microseconds. Each way has matrices for itself, more than caches hold.
With --cpu all is done by one processor and its own time is taken, which tells something on a busy machine too.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mistral_core import backend as backends
from mistral_core.native import library
from mistral_core.quantization.blocks import blocks
from mistral_core.quantization.matrix import KINDS, PackedMatrix, packed_codes, whole_block

from .common import keep, listed, machine, report, table_row

ASKED: tuple[tuple[str, tuple[int | None, int | None]], ...] = (
    ("int8", (1, None)), ("int8", (1, 128)), ("int8", (1, 32)), ("int4", (1, 128)), ("int4", (1, 32)),
    ("int4", (1, 16)), ("nf4", (1, 64)), ("fp8", (128, 128)),
)  # fmt: skip
COPIES_BYTES = 256 << 20
"""Of a way's matrices together: no cache holds so many."""
Way = Callable[[int], Any]
"""A call with the number of a copy."""


def packed(kind: str, block: tuple[int | None, int | None], shape: tuple[int, int]) -> list[PackedMatrix]:
    """Copies of a random matrix, each in memory of its own."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << KINDS[kind].bits, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0
    whole = whole_block(block, shape)
    scale = rng.uniform(0.5, 1.5, blocks(shape, whole)).astype(ml_dtypes.bfloat16)
    one = PackedMatrix(kind, packed_codes(kind, codes), scale, None, shape, whole)
    return [one._replace(codes=one.codes.copy()) for _ in range(max(COPIES_BYTES // one.nbytes, 2))]


def measured(
    ways: dict[tuple[str, ...], tuple[Way, int, int]], repeats: int, clock: Callable[[], float]
) -> dict[tuple[str, ...], float]:
    """Seconds of one call of each way, (function, copies, bytes): medians over rounds of all."""
    times: dict[tuple[str, ...], list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        report(f"round {number} of {repeats}")
        for name, (call, copies, _) in ways.items():
            start = clock()
            for copy in range(copies if number else 2):
                call(copy % copies)
            if number:  # the first compiles
                times[name].append((clock() - start) / copies)
    return {name: statistics.median(each) for name, each in times.items()}


def in_framework(name: str, array: np.ndarray) -> Any:
    """An array with its bits."""
    if name == "torch":
        import torch

        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if name == "flax":
        import jax

        return jax.device_put(array)
    import tensorflow as tf

    return tf.constant(array)


def compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as users run it, until its result is there."""
    if name == "torch":
        import torch

        return torch.no_grad()(torch.compile(function, dynamic=False))
    if name == "flax":
        import jax

        jitted = jax.jit(function)
        return lambda *arrays: jitted(*arrays).block_until_ready()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it counts all functions of one line as one
    return tf.function(function, autograph=False)


def of_framework(name: str, shape: tuple[int, int], counts: list[int]) -> dict[tuple[str, ...], tuple[Way, int, int]]:
    """The products of floats of a backend, compiled, and the kernels as it calls them."""
    ways: dict[tuple[str, ...], tuple[Way, int, int]] = {}
    rng = np.random.default_rng(0)
    products = importlib.import_module(f"mistral_{name}.products")
    native = importlib.import_module(f"mistral_{name}.native")
    for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
        size = shape[0] * shape[1] * dtype.itemsize
        copies = max(COPIES_BYTES // size, 2)
        weight = rng.normal(size=shape).astype(dtype)
        weights = [in_framework(name, weight.copy()) for _ in range(copies)]
        for rows in counts:
            x = in_framework(name, rng.normal(size=(rows, shape[1])).astype(dtype))
            call = compiled(name, lambda x, weight: products.product(x, weight))
            way = lambda copy, call=call, x=x, weights=weights: call(x, weights[copy])  # noqa: E731
            ways[f"{name}, products.py", dtype.name, "", str(rows)] = (way, copies, size)
    if not native.available():
        report(f"{name}: {native.why()}")
        return ways
    for kind, block in (("int8", (1, None)), ("int4", (1, 128))):
        matrices = packed(kind, block, shape)
        like = {"kind": kind, "shape": shape, "block": matrices[0].block}
        arrays = [(in_framework(name, each.codes), in_framework(name, each.scale)) for each in matrices]
        for rows in counts:
            x = in_framework(name, rng.normal(size=(rows, shape[1])).astype(np.float32))
            call = compiled(name, lambda x, codes, scale, like=like: native.product(x, codes, scale, **like))
            way = lambda copy, call=call, x=x, arrays=arrays: call(x, *arrays[copy])  # noqa: E731
            ways[f"{name}, the kernel", kind, said(block), str(rows)] = (way, len(matrices), matrices[0].nbytes)
    return ways


def of_kernels(shape: tuple[int, int], counts: list[int]) -> dict[tuple[str, ...], tuple[Way, int, int]]:
    """The kernels with NumPy's arrays: products, and dequantising by the bytes that are written."""
    ways: dict[tuple[str, ...], tuple[Way, int, int]] = {}
    rng = np.random.default_rng(0)
    words = np.ones(COPIES_BYTES // 8, np.uint64)
    read = library.kernels().read
    ways["memory", "read", "", ""] = (lambda copy: read(words.ctypes.data, words.size, 0), 1, words.nbytes)
    written = np.empty(COPIES_BYTES // 4, np.float32)
    ways["memory", "filled", "", ""] = (lambda copy: written.fill(1), 1, written.nbytes)
    for kind, block in ASKED:
        matrices = packed(kind, block, shape)
        for rows, activations in itertools.product(counts, (None, "int8") if kind in ("int8", "int4") else (None,)):
            x = rng.normal(size=(rows, shape[1])).astype(np.float32)
            way = lambda copy, x=x, matrices=matrices, activations=activations: library.product(  # noqa: E731
                x, matrices[copy], activations=activations
            )
            name = "C" if activations is None else "C, activations int8"
            ways[name, kind, said(block), str(rows)] = (way, len(matrices), matrices[0].nbytes)
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            memory = np.zeros(shape, dtype)
            arrays, given = library._arrays(matrices[0])
            number, *sizes, _ = library._numbers(matrices[0])
            call = functools.partial(
                library.kernels().dequantised, number, *given, *sizes, memory.ctypes.data, library.TYPES[dtype.name], 0
            )
            way = lambda copy, call=call, held=(memory, arrays): call()  # noqa: E731
            ways["C, dequantised, bytes written", f"{kind} to {dtype.name}", said(block), ""] = (way, 3, memory.nbytes)
    return ways


def said(block: tuple[int | None, int | None]) -> str:
    """A block in a cell."""
    return " x ".join("all" if size is None else str(size) for size in block)


def page(shape: tuple[int, int], counts: list[int], ways: dict[Any, Any], seconds: dict[Any, float], cpu: bool) -> str:
    """A table with a line for each way and a column for each number of rows."""
    what = "CPU time of one processor" if cpu else f"time on {len(os.sched_getaffinity(0))} processors"
    lines = [f"{machine()}, {shape[0]} x {shape[1]}, {what}; GB/s (microseconds).", ""]
    heads = ["", "weights", "block", *(f"rows: {rows}" for rows in counts)]
    lines += [table_row(heads), table_row(["---"] * len(heads))]
    for start in dict.fromkeys(name[:3] for name in ways):
        cells = []
        for rows in [*map(str, counts), ""]:
            if (found := (*start, rows)) in ways:
                rate = ways[found][2] / seconds[found] / 1e9
                cells.append(f"{rate:.1f} ({seconds[found] * 1e6:.0f})")
        lines.append(table_row([*start, *cells, *[""] * (len(counts) - len(cells))]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=listed, default=["7168", "2048"])
    parser.add_argument("--rows", type=listed, default=["1", "4", "16"])
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="the processor's time, with one processor")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    asked = parser.parse_args()
    os.environ.update({name: value for name, value in backends.POLITE.items() if name not in os.environ})
    if asked.cpu:  # before any framework counts processors
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    if not library.available():
        parser.exit(1, f"{library.why()}\n")
    shape, counts = (int(asked.shape[0]), int(asked.shape[1])), [int(rows) for rows in asked.rows]
    ways = of_kernels(shape, counts)
    for name in asked.backend:
        if name:
            ways |= of_framework(name, shape, counts)
    seconds = measured(ways, asked.repeats, time.process_time if asked.cpu else time.perf_counter)
    text = page(shape, counts, ways, seconds, asked.cpu)
    print(text)
    if asked.write:
        keep("rows.md", text)


if __name__ == "__main__":
    main()
