"""A matrix of few bits: codes, what they stand for, and a scale for each block of them.

    w[o, i] = (value(code[o, i]) - zero[block]) * scale[block]

This is what every packed format is made into when it is read, what the backends compute with, and what is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..errors import CorruptCheckpointError, MeshError
from .blocks import Block, blocks, spread

ROWS = 128
"""Rows are dequantised in so many at once, so that their floats stay in the processor's cache."""


ROUNDED_COLUMNS = 128
"""Columns that share a scale where what is multiplied is rounded to eight bits (`activations="int8"`)."""


class Kind(NamedTuple):
    """What codes stand for."""

    bits: int
    values: np.ndarray
    """float32 by unsigned code."""
    is_integer: bool = False
    """Whether the values are all integers of so many bits, around 0."""


NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32
)  # fmt: skip
"""The sixteen values of NormalFloat-4 (QLoRA, appendix E), as bitsandbytes stores them."""

KINDS = {
    "int8": Kind(8, np.arange(-128, 128, dtype=np.float32), is_integer=True),
    "int4": Kind(4, np.arange(-8, 8, dtype=np.float32), is_integer=True),
    "nf4": Kind(4, NF4),
    "fp8": Kind(8, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)),
}
"""The kinds by name; fp8 is E4M3 without infinities."""


class PackedMatrix(NamedTuple):
    """A matrix [O, I] of few bits."""

    kind: str
    """A key of `KINDS`."""
    codes: np.ndarray
    """int8: int8 [O, I], the values themselves; fp8: uint8 [O, I]; else uint8 [O, ceil(I/2)], even columns low."""
    scale: np.ndarray
    """[blocks down, blocks across] of bfloat16, float16 or float32."""
    zero: np.ndarray | None
    """int8, as `scale`: the value that means 0; None where that is 0 everywhere."""
    shape: tuple[int, int]
    """[O, I]."""
    block: tuple[int, int]
    """Rows and columns that share a scale; at the ends there may be fewer."""

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)


def unsigned(matrix: PackedMatrix, rows: slice = slice(None)) -> np.ndarray:
    """The codes of some rows as uint8 [rows, I], each an index into the values of its kind."""
    codes = matrix.codes[rows]
    if matrix.kind == "int8":
        return codes.view(np.uint8) ^ np.uint8(0x80)
    if KINDS[matrix.kind].bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)[:, : matrix.shape[1]]


def packed_codes(kind: str, numbers: np.ndarray) -> np.ndarray:
    """Unsigned codes uint8 [O, I] as a `PackedMatrix` has them; the last of an odd number stands with a 0."""
    if kind == "int8":
        return (numbers ^ np.uint8(0x80)).view(np.int8)
    if KINDS[kind].bits == 8:
        return numbers
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def swapped(pairs: np.ndarray) -> np.ndarray:
    """Bytes of two codes, the first in the high half, with it in the low half, and the other way round."""
    return pairs >> 4 | pairs << 4


def dequantised(matrix: PackedMatrix) -> np.ndarray:
    """The matrix as float32 [O, I], each number rounded once."""
    result = np.empty(matrix.shape, np.float32)
    value, scale = KINDS[matrix.kind].values, spread(matrix.scale, matrix.shape, matrix.block)
    zero = None if matrix.zero is None else spread(matrix.zero, matrix.shape, matrix.block)
    for start in range(0, matrix.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, matrix.shape[0]))
        numbers = value[unsigned(matrix, rows)]
        if zero is not None:
            numbers -= zero(rows)
        np.multiply(numbers, scale(rows), out=result[rows])
    return result


def check(matrix: PackedMatrix, where: str) -> None:
    """Raise CorruptCheckpointError for scales and codes that no writer of packed files makes."""
    scale = matrix.scale.astype(np.float32)
    wrong = ~np.isfinite(scale) if matrix.kind == "nf4" else ~(np.isfinite(scale) & (scale != 0))
    if wrong.any():
        raise CorruptCheckpointError(
            f"{where}: scales must be finite numbers{'' if matrix.kind == 'nf4' else ' and not 0'}, got "
            f"{float(scale[wrong][0])}; copy the file again, or load it with quantization='dequantize'."
        )
    if matrix.kind == "fp8" and ((matrix.codes & 0x7F) == 0x7F).any():
        raise CorruptCheckpointError(f"{where}: holds the code of NaN; copy the file again.")


def in_order(matrix: PackedMatrix, order: np.ndarray) -> PackedMatrix | None:
    """The matrix with row order[o] in the place of row o; None where rows that share a scale part."""
    down = len(matrix.scale)
    if down not in (1, matrix.shape[0]):
        return None
    moved = matrix._replace(codes=matrix.codes[order])
    if down == 1:
        return moved
    return moved._replace(scale=matrix.scale[order], zero=None if matrix.zero is None else matrix.zero[order])


Index = tuple[slice, slice]
"""Rows and columns of a matrix."""


def part_of(matrix: PackedMatrix, index: Index, where: str = "matrix") -> PackedMatrix:
    """The part of a matrix at an index, in the same bits.

    Raises MeshError where it begins or ends inside a block of numbers that share a scale, or inside a byte.
    """
    cuts = [slice(*cut.indices(size)) for cut, size in zip(index, matrix.shape, strict=True)]
    for axis, (cut, size, length) in enumerate(zip(cuts, matrix.shape, matrix.block, strict=True)):
        in_a_byte = 2 if axis == 1 and KINDS[matrix.kind].bits == 4 else 1
        is_inside = cut.start // length == (cut.stop - 1) // length
        step = in_a_byte if is_inside else math.lcm(length, in_a_byte)
        if cut.start % step or (cut.stop % step and cut.stop < size):
            raise MeshError(
                f"{where}: {'columns' if axis else 'rows'} {cut.start} to {cut.stop} of a packed matrix must begin and "
                f"end at a multiple of {step}, for so many share a scale or a byte; cut it into fewer parts, or pack "
                "it in smaller groups."
            )
    rows, columns = (cut.stop - cut.start for cut in cuts)
    of_codes, of_scales = _places(matrix.kind, matrix.block, cuts)
    zero = None if matrix.zero is None else matrix.zero[of_scales]
    block = min(matrix.block[0], rows), min(matrix.block[1], columns)
    return PackedMatrix(matrix.kind, matrix.codes[of_codes], matrix.scale[of_scales], zero, (rows, columns), block)


def whole_of(parts: Sequence[tuple[Index, PackedMatrix]], shape: tuple[int, int], block: Block) -> PackedMatrix:
    """The matrix of this shape and block whose parts these are, by their index; some may be there more than once."""
    first, whole = parts[0][1], whole_block(block, shape)
    codes = np.empty(
        (shape[0], shape[1] if KINDS[first.kind].bits == 8 else math.ceil(shape[1] / 2)), first.codes.dtype
    )
    scale = np.empty(blocks(shape, whole), first.scale.dtype)
    zero = None if first.zero is None else np.empty(scale.shape, first.zero.dtype)
    for index, part in parts:
        cuts = [slice(*cut.indices(size)) for cut, size in zip(index, shape, strict=True)]
        of_codes, of_scales = _places(first.kind, whole, cuts)
        codes[of_codes], scale[of_scales] = part.codes, part.scale
        if zero is not None:
            zero[of_scales] = part.zero
    return PackedMatrix(first.kind, codes, scale, zero, shape, whole)


def _places(kind: str, block: tuple[int, int], cuts: Sequence[slice]) -> tuple[Index, Index]:
    """Where in its arrays the codes of a part of a matrix are, and where its scales."""
    in_a_byte = 1 if KINDS[kind].bits == 8 else 2
    return (cuts[0], _covering(cuts[1], in_a_byte)), (_covering(cuts[0], block[0]), _covering(cuts[1], block[1]))


def _covering(cut: slice, length: int) -> slice:
    return slice(cut.start // length, math.ceil(cut.stop / length))


def whole_block(block: Block, shape: tuple[int, int]) -> tuple[int, int]:
    """A block of which None means all, and which is no longer than the matrix."""
    rows, columns = (size if length is None else min(length, size) for length, size in zip(block, shape, strict=True))
    return rows, columns
