"""The ways of packing a matrix into integers or eight-bit floats, each as its definition says.

A packing checks the headers of a matrix' parts (`shape`), then gives any of its rows (`rows`) as they are in float32;
the one who asks rounds them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from ..errors import CorruptCheckpointError, DtypeMismatchError, MissingTensorsError, ShapeMismatchError
from ..weights.containers.tensor_file import PACKED, TensorInfo, quoted
from .blocks import Block, Rows, blocks, by_column, spread
from .matrix import PackedMatrix, packed_codes, whole_block
from .schemes import Scheme

ROWS = 128
"""Rows are asked for in so many at once, from a multiple of it: whole words of every packing."""

FLOATS = frozenset({"F32", "F16", "BF16"})


class Parts(NamedTuple):
    """What stands in the files for one matrix: its parts by the last part of their names."""

    base: str
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    """The stored numbers of a part."""

    @property
    def where(self) -> str:
        """The file and the matrix, for messages."""
        return f"{next(iter(self.infos.values())).file}: {quoted(self.base)}"

    def check(self, part: str, dtypes: Collection[str], *shapes: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape of a part, which should be one of the shapes; without any, one of two dimensions."""
        if part not in self.infos:
            raise MissingTensorsError(f"{self.where}: lacks its {part}; download the checkpoint again.")
        found = self.infos[part]
        if found.dtype not in dtypes:
            wanted = ", ".join(sorted(dtypes))
            raise DtypeMismatchError(f"{self.where}: {part} must be {wanted}, got {found.dtype}.")
        if (found.shape not in shapes) if shapes else (len(found.shape) != 2 or 0 in found.shape):
            wanted = " or ".join(str(list(shape)) for shape in shapes if shape is not None) or "a matrix"
            raise ShapeMismatchError(f"{self.where}: {part} must be {wanted}, got {list(found.shape)}.")
        return found.shape


class Packing(NamedTuple):
    """One way of packing."""

    parts: tuple[str, ...]
    """All parts that a matrix may have; the first is one that every packed matrix has and no other."""
    shape: Callable[[Parts, Scheme], tuple[int, int]]
    """[out, in], once the headers of the parts agree."""
    rows: Callable[[Parts, Scheme, tuple[int, int]], Rows]
    matrix: Callable[[Parts, Scheme, tuple[int, int]], PackedMatrix | None]
    """All of it in few bits as it is, or None where its blocks are not those of a `PackedMatrix`."""


def unpacked(words: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Unsigned integers out of 32-bit words along an axis, the lowest bits first, or in an order of their places."""
    words = np.ascontiguousarray(words).view(np.uint32)
    shifts = bits * np.array(order or range(32 // bits), np.uint32)
    several = words[:, :, None] >> shifts if axis == 1 else words[:, None, :] >> shifts[:, None]
    several = (several & np.uint32((1 << bits) - 1)).astype(np.uint8)
    rows, columns = words.shape
    return several.reshape(rows, -1) if axis == 1 else several.reshape(-1, columns)


def grouped(parts: Parts, part: str, groups: int) -> np.ndarray:
    """The group of each column as a part tells it; raises CorruptCheckpointError for one that there is not."""
    group = parts.read(part)
    if group.min() < 0 or group.max() >= groups:
        raise CorruptCheckpointError(f"{parts.where}: {part} names groups beyond {groups}; copy the file again.")
    return group


# Scaled numbers: eight-bit floats or integers, and dense words of integers (compressed-tensors)


def _scale_shapes(shape: tuple[int, int], block: Block | None) -> list[tuple[int, ...]]:
    """How the scales of a matrix may be arranged: one of a single row or column may lack that dimension."""
    if block is None:
        return [*_scale_shapes(shape, (None, None)), *_scale_shapes(shape, (1, None))]
    down, across = blocks(shape, block)
    return [(down, across)] + [(down,)] * (across == 1) + [()] * (down == across == 1)


def _scales(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> tuple[Block, np.ndarray]:
    """The block of each scale, and the scales as [blocks down, blocks across]."""
    stored = parts.read(scheme.scale)
    block = scheme.block or ((None, None) if stored.size == 1 else (1, None))
    return block, stored.reshape(blocks(shape, block)).astype(np.float32)


def _zeros(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """The zero points as [blocks down, blocks across]; a symmetric matrix has none but zeros."""
    if _ZERO not in parts.infos:
        return np.zeros(shape, np.float32)
    stored = parts.read(_ZERO)
    if stored.dtype == np.int32:
        stored = unpacked(stored, scheme.bits, 0)[: shape[0]].astype(np.float32) - (1 << scheme.bits - 1)
    found = stored.astype(np.float32)
    if scheme.symmetric is not False and found.any():
        raise CorruptCheckpointError(f"{parts.where}: has zero points, but the config says symmetric; correct one.")
    return np.zeros(shape, np.float32) if scheme.symmetric is not False else found.reshape(shape)


def _scaled_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    rows, columns = parts.check("weight", {scheme.dtype})
    shapes = _scale_shapes((rows, columns), scheme.block)
    parts.check(scheme.scale, FLOATS, *shapes)
    if scheme.symmetric is False:
        parts.check(_ZERO, {"I8"}, *shapes)
    return rows, columns


def _scaled_rows(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    block, scales = _scales(parts, scheme, shape)
    stored, scale = parts.read("weight").view(np.uint8), spread(scales, shape, block)
    value = np.arange(256, dtype=np.uint8).view(PACKED[scheme.dtype]).astype(np.float32)
    zeros = _zeros(parts, scheme, scales.shape)
    if not zeros.any():
        return lambda wanted: value[stored[wanted]] * scale(wanted)
    zero = spread(zeros, shape, block)
    return lambda wanted: (value[stored[wanted]] - zero(wanted)) * scale(wanted)


def _packed_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    rows, words = parts.check("weight_packed", {"I32"})
    parts.check("weight_shape", {"I64", "I32"}, (2,))
    out, columns = (int(size) for size in parts.read("weight_shape"))
    if out != rows or math.ceil(columns * scheme.bits / 32) != words:
        raise CorruptCheckpointError(f"{parts.where}: {rows} rows of {words} words cannot be {[out, columns]}.")
    shape = out, columns
    shapes = _scale_shapes(shape, scheme.block)
    parts.check(scheme.scale, FLOATS, *shapes)
    if scheme.symmetric is False:
        down, across = shapes[0]
        packed = (math.ceil(down * scheme.bits / 32), across)
        if parts.check(_ZERO, {"I8", "I32"}, packed, *shapes) and parts.infos[_ZERO].dtype == "I32":
            parts.check(_ZERO, {"I32"}, packed)
        else:
            parts.check(_ZERO, {"I8"}, *shapes)
    if _GROUP in parts.infos:
        parts.check(_GROUP, {"I32"}, (columns,))
    return shape


def _packed_rows(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    block, scales = _scales(parts, scheme, shape)
    words, middle = parts.read("weight_packed"), np.float32(1 << scheme.bits - 1)
    zeros = _zeros(parts, scheme, scales.shape)
    scale, zero = spread(scales, shape, block), spread(zeros, shape, block)
    if _GROUP in parts.infos and (parts.read(_GROUP) != -1).any():  # -1: not in another order after all
        group = grouped(parts, _GROUP, scales.shape[1])
        scale, zero = by_column(scales, group), by_column(zeros, group)

    def rows(wanted: slice) -> np.ndarray:
        numbers = unpacked(words[wanted], scheme.bits, 1)[:, : shape[1]] - middle
        return (numbers - zero(wanted)) * scale(wanted)

    return rows


def _blocks_of(parts: Parts, scheme: Scheme, shape: tuple[int, int], kind: str) -> PackedMatrix:
    """A matrix without its codes."""
    block, stored = scheme.block, parts.read(scheme.scale)
    block = block or ((None, None) if stored.size == 1 else (1, None))
    sizes = blocks(shape, block)
    zero = _zeros(parts, scheme, sizes)
    return PackedMatrix(
        kind, np.empty(0, np.uint8), stored.reshape(sizes), zero.astype(np.int8) if zero.any() else None, shape,
        whole_block(block, shape),
    )  # fmt: skip


def _scaled_matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> PackedMatrix | None:
    matrix, stored = _blocks_of(parts, scheme, shape, _KINDS[scheme.dtype]), parts.read("weight")
    return matrix._replace(codes=stored if matrix.kind == "int8" else stored.view(np.uint8))


def _packed_matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> PackedMatrix | None:
    if _GROUP in parts.infos and (parts.read(_GROUP) != -1).any():
        return None
    matrix, words = _blocks_of(parts, scheme, shape, f"int{scheme.bits}"), parts.read("weight_packed")
    codes = words.view(np.uint8)[:, : math.ceil(shape[1] * scheme.bits / 8)]
    return matrix._replace(codes=packed_codes("int8", codes) if scheme.bits == 8 else np.ascontiguousarray(codes))


_KINDS = {"I8": "int8", "F8_E4M3": "fp8"}
_ZERO, _GROUP = "weight_zero_point", "weight_g_idx"
PACKED_WORDS = Packing(
    ("weight_packed", "weight_scale", "weight_shape", _ZERO, _GROUP), _packed_shape, _packed_rows, _packed_matrix
)


def scaled(scheme: Scheme) -> Packing:
    """Numbers of eight bits and their scales."""
    return Packing((scheme.scale, "weight", _ZERO), _scaled_shape, _scaled_rows, _scaled_matrix)
