"""The few array moves between the table's layout and those of foreign formats, each with its inverse.

Bits are moved, never values: NaN payloads, signed zeros and denormals arrive as they left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..arrays import bits
from ..config import MistralConfig
from ..parameters import Parameter, axis_sizes, shape_of

_STRIP, _LENGTH = 8, 4096  # rows and columns that are transposed at once: more, and what is written leaves the cache


class Layout(NamedTuple):
    """How a format arranges a tensor that the table has as [out, in] with half-split rotary rows."""

    transposed: bool = False
    """[in, out]"""
    split: bool = False
    """Heads and their dimension are two axes: [N, H] for NH."""
    interleaved: bool = False
    """The two numbers of a rotary pair lie side by side: rows 0, d/2, 1, d/2+1 ... of each head."""

    @property
    def moves(self) -> str:
        """The moves by name, for reports; empty where there is none."""
        names = {"transposed": self.transposed, "heads split": self.split, "rotary pairs interleaved": self.interleaved}
        return ", ".join(name for name, done in names.items() if done)

    @property
    def moves_rows_only(self) -> bool:
        """Whether rows are in another order, and nothing else moves."""
        return self.interleaved and not self.transposed and not self.split


def as_it_is(row: Parameter) -> Layout:
    """The table's own layout."""
    return Layout()


def kernel(row: Parameter) -> Layout:
    """The layout of frameworks that multiply inputs from the left."""
    return Layout(transposed=row.is_linear)


def heads_kernel(row: Parameter) -> Layout:
    """The same with heads as an axis of their own."""
    return Layout(transposed=row.is_linear, split=row.kind == "attention")


def rotary_pairs(row: Parameter) -> Layout:
    """The layout of raw Mistral and GGUF."""
    return Layout(interleaved=row.rotary)


def stored_shape(row: Parameter, config: MistralConfig, layout: Layout) -> tuple[int, ...]:
    """The shape of a row's tensor in a layout."""
    axes = row.axes[::-1] if layout.transposed else row.axes
    sizes = axis_sizes(config)
    if layout.split:
        return tuple(sizes[letter] for axis in axes for letter in axis)
    return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)


def to_stored(array: np.ndarray, row: Parameter, config: MistralConfig, layout: Layout) -> np.ndarray:
    """An array of the table's layout in another, C-contiguous; the same array where nothing moves."""
    if not layout.moves:
        return array
    moved = bits(array)
    if layout.interleaved:
        heads, size = _heads(row, config)
        moved = moved.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(moved.shape)
    if layout.transposed:
        moved = _transposed(moved)
    return moved.view(array.dtype).reshape(stored_shape(row, config, layout))


def to_canonical(array: np.ndarray, row: Parameter, config: MistralConfig, layout: Layout) -> np.ndarray:
    """The inverse of `to_stored`."""
    if not layout.moves:
        return array
    moved = bits(array)
    shape = shape_of(row, config)
    if layout.transposed:
        moved = _transposed(moved.reshape(shape[::-1]))
    if layout.interleaved:
        heads, size = _heads(row, config)
        moved = moved.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    return moved.view(array.dtype).reshape(shape)


def row_order(row: Parameter, config: MistralConfig, layout: Layout) -> np.ndarray:
    """The stored row of each row of the table's layout, of a layout that moves nothing else."""
    heads, size = _heads(row, config)
    stored = np.arange(heads * size)
    return stored.reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1) if layout.interleaved else stored


def _heads(row: Parameter, config: MistralConfig) -> tuple[int, int]:
    sizes = axis_sizes(config)
    return sizes[row.axes[0][0]], sizes[row.axes[0][1]]


def _transposed(matrix: np.ndarray) -> np.ndarray:
    """A transposed copy; strip by strip, which is ten times faster than NumPy's own of a large matrix."""
    height, width = matrix.shape
    result = np.empty((width, height), matrix.dtype)
    for left in range(0, width, _LENGTH):
        columns = slice(left, left + _LENGTH)
        for top in range(0, height, _STRIP):
            rows = slice(top, top + _STRIP)
            result[columns, rows] = matrix[rows, columns].T
    return result
