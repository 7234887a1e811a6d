"""Blocks of a matrix whose numbers share one scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Block = tuple[int | None, int | None]
"""Rows and columns that share a number; None: all."""
Rows = Callable[[slice], np.ndarray]
"""Rows of a matrix as float32 [rows, in]."""


def blocks(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """How many blocks a matrix has in each direction, the last ones smaller where it is no multiple."""
    rows, columns = (size if length is None else length for size, length in zip(shape, block, strict=True))
    return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)


def spread(values: np.ndarray, shape: tuple[int, int], block: Block) -> Rows:
    """The value of its block for every number; `values` is [blocks down, blocks across]."""
    values = values.astype(np.float32)
    high, wide = (size if length is None else length for size, length in zip(shape, block, strict=True))
    return by_column(values, np.arange(shape[1]) // wide, high)


def by_column(values: np.ndarray, group: np.ndarray, high: int = 1) -> Rows:
    """The same where each column says which group it is of."""

    def rows(wanted: slice) -> np.ndarray:
        return values[np.arange(wanted.start, wanted.stop) // high][:, group]

    return rows
