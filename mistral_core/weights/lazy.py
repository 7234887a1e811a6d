"""The tensors of an opened checkpoint as a mapping, each read anew when it is asked for: one in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..quantization.matrix import PackedMatrix
from .contents import Contents
from .matching import canonical_names

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """Canonical name -> what a function gives; a name whose function gives None is not there."""

    def __init__(self, reads: Mapping[str, Callable[[], T | None]]) -> None:
        self._reads = reads

    def __getitem__(self, name: str) -> T:
        found = self._reads[name]()
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


def arrays(checkpoint: Contents, dtype: npt.DTypeLike | None = None) -> Lazy[np.ndarray]:
    """Every tensor as it is stored, or in a dtype; packed matrices as floats."""

    def read(source: str) -> np.ndarray:
        array = checkpoint.read(source)
        return array if dtype is None else array.astype(dtype)

    names = canonical_names(checkpoint.tensors)
    return Lazy({name: functools.partial(read, source) for name, source in names.items()})


def matrices(checkpoint: Contents) -> Lazy[PackedMatrix]:
    """The packed matrices in few bits."""
    names = canonical_names(checkpoint.tensors)
    found = {name: checkpoint.packed(source) for name, source in names.items()}
    return Lazy({name: packed.matrix for name, packed in found.items() if packed is not None})
