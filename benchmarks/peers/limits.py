"""What the machine allows: reading memory the fastest way known here, and a framework's large matrix product.

Option: framework.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.common import say, task, timed
from mistral_core.native import library

READ = 1 << 30
M, K, N = 2048, 4096, 4096


def readers() -> list[Callable[[], Any]]:
    """Ways to read 1 GiB: by C, where there is a compiler, by torch's sum, where it is, and by NumPy."""
    words = np.ones(READ // 8, np.uint64)
    ways: list[Callable[[], Any]] = [numpy_reader()]
    if library.available():
        read = library.kernels().read
        ways.append(lambda: read(words.ctypes.data, words.size, 0))
    if importlib.util.find_spec("torch") is not None:
        import torch

        tensor = torch.from_numpy(words).view(torch.float32)
        ways.append(lambda: tensor.sum())
    return ways


def numpy_reader(size: int = READ) -> Callable[[], Any]:
    """Reads so many bytes by NumPy's maximum in a thread a core: the same beside every framework."""
    parts = np.array_split(np.ones(size // 8, np.uint64), os.cpu_count() or 1)
    pool = ThreadPoolExecutor(len(parts))
    return lambda: list(pool.map(np.max, parts))


def product(framework: str, dtype: str) -> Callable[[], Any]:
    """One product [M, K] x [N, K] transposed, awaited, in the formulation that is fastest there."""
    rng = np.random.default_rng(0)
    a, b = rng.random((M, K), np.float32), rng.random((N, K), np.float32)
    if framework == "torch":
        import torch

        left, right = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (a, b))
        return lambda: left @ right.T
    if framework == "flax":
        import jax
        import jax.numpy as jnp

        left, right = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        multiply = jax.jit(lambda x, y: jnp.einsum("mk,nk->mn", x, y, preferred_element_type=jnp.float32))
        return lambda: multiply(left, right).block_until_ready()
    import tensorflow as tf

    left, right = tf.cast(a, dtype), tf.cast(b, dtype)
    return lambda: tf.matmul(left, right, transpose_b=True).numpy()


def main() -> None:
    asked = task()
    framework = asked["options"]["framework"]
    found: dict[str, float] = {}
    for name, ways, amount in (
        ("read", readers(), READ),
        ("matmul", [product(framework, asked["dtype"])], 2 * M * K * N),
    ):
        found[name] = amount / min(_median(function, asked["calls"]) for function in ways)
    say(found, "numpy")


def _median(function: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, after one that warms up."""
    function()
    return statistics.median(timed(function) for _ in range(calls))


if __name__ == "__main__":
    main()
