"""Several processes of `jax.distributed` that hold a model together, each with its own devices.

What is asked here is a collective: every process asks, in the same order, and each waits for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def is_here(array: Array) -> bool:
    """Whether this process has all values of an array, which others may have too."""
    return array.is_fully_addressable or array.is_fully_replicated


def gathered(array: Array) -> np.ndarray:
    """All of an array in NumPy, bits kept; asked of the other processes where they hold parts of it."""
    if isinstance(array, Array) and not is_here(array):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


class Processes:
    """The processes that some devices belong to."""

    def __init__(self, devices: Iterable[jax.Device]) -> None:
        ordered = sorted(devices, key=lambda device: device.id)
        self.mesh = Mesh(np.array(ordered), ("all",))
        self.first = min(device.process_index for device in ordered)

    @classmethod
    def of(cls, array: Array) -> Processes | None:
        """Those that hold an array; None where this one holds all of it."""
        return None if array.is_fully_addressable else cls(array.sharding.device_set)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes, and that decides where one has to."""
        return jax.process_index() == self.first

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any of them."""
        return bool(self._largest(np.array([flag], np.uint32))[0])

    def number(self, number: int) -> int:
        """The number below 2**64 that the first of them says."""
        words = np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)
        high, low = map(int, self._largest(words if self.is_first else np.zeros_like(words)))
        return high << 32 | low

    def _largest(self, words: np.ndarray) -> np.ndarray:
        """The largest of all processes' words, word by word."""
        cut = NamedSharding(self.mesh, PartitionSpec("all"))
        rows = jax.make_array_from_callback((self.mesh.size, *words.shape), cut, lambda _: words[None])
        return np.asarray(_largest(rows, NamedSharding(self.mesh, PartitionSpec())))


@functools.partial(jax.jit, static_argnums=1)
def _largest(rows: Array, everywhere: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(rows.max(0), everywhere)
