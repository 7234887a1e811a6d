"""The order in which examples are learnt from: a function of the seed and the epoch, the same everywhere."""

from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..reference.sampling import threefry

SEEDS = 1 << 64
"""A seed is an integer from 0 up to this one, without it."""


def permutation(size: int, *, seed: int, path: tuple[int, ...]) -> Array:
    """The numbers [size] from 0 in an order drawn for a seed and a path of integers below 2^32, such as (epoch,).

    The key is the seed's two words, the high one first, and for each step s of the path in turn Threefry(key; 0, s);
    the numbers i are sorted by the 64 bits Threefry(key; 1, i), equal ones by i. `threefry` is the generator that
    texts are sampled with: nothing of it depends on a framework, a version of NumPy or a machine.
    """
    key = _words(seed >> 32, seed & 0xFFFFFFFF)
    for step in path:
        key = threefry(key, _words(0, step))
    high, low = threefry(key, (np.ones(size, np.uint32), np.arange(size, dtype=np.uint32)))
    return np.argsort(high.astype(np.uint64) << np.uint64(32) | low, kind="stable")


def _words(high: int, low: int) -> tuple[Array, Array]:
    return np.array([high], np.uint32), np.array([low], np.uint32)
