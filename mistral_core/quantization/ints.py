"""AWQ and GPTQ: matrices [in, out] of integers in 32-bit words, with a scale and a zero point for groups of inputs."""

from __future__ import annotations

import math

import numpy as np

from ..errors import CorruptCheckpointError, UnsupportedFeatureError
from .blocks import Rows, blocks, by_column, spread
from .matrix import KINDS, PackedMatrix, packed_codes, whole_block
from .packings import FLOATS, Packing, Parts, grouped, unpacked
from .schemes import Scheme

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the outputs 0 to 7 stand."""


def _awq_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    inputs, words = parts.check("qweight", {"I32"})
    shape = words * 8, inputs
    groups = blocks(shape, scheme.block or (1, None))[1]
    parts.check("qzeros", {"I32"}, (groups, words))
    parts.check("scales", FLOATS, (groups, shape[0]))
    return shape


def _awq_rows(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    words = parts.read("qweight")
    block = scheme.block or (1, None)
    zeros = spread(unpacked(parts.read("qzeros"), 4, 1, _AWQ_PLACES).T, shape, block)
    scales = spread(parts.read("scales").T, shape, block)

    def rows(wanted: slice) -> np.ndarray:
        numbers = unpacked(words[:, wanted.start // 8 : -(-wanted.stop // 8)], 4, 1, _AWQ_PLACES).T
        return (numbers - zeros(wanted)) * scales(wanted)

    return rows


def _awq_matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> PackedMatrix | None:
    numbers = unpacked(parts.read("qweight"), 4, 1, _AWQ_PLACES).T
    zeros = unpacked(parts.read("qzeros"), 4, 1, _AWQ_PLACES).T
    return _grouped("int4", numbers, parts.read("scales").T, zeros.astype(np.int16), shape, scheme)


def _grouped(
    kind: str, numbers: np.ndarray, scale: np.ndarray, zeros: np.ndarray, shape: tuple[int, int], scheme: Scheme
) -> PackedMatrix:
    """A matrix of unsigned numbers and zero points [out, groups]."""
    zero = (zeros - (1 << KINDS[kind].bits - 1)).astype(np.int8)
    codes, block = packed_codes(kind, np.ascontiguousarray(numbers)), whole_block(scheme.block or (1, None), shape)
    return PackedMatrix(kind, codes, np.ascontiguousarray(scale), zero if zero.any() else None, shape, block)


def _gptq_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    each = 32 // scheme.bits
    words, outputs = parts.check("qweight", {"I32"})
    shape = outputs, words * each
    groups = blocks(shape, scheme.block or (1, None))[1]
    parts.check("qzeros", {"I32"}, (groups, math.ceil(outputs / each)))
    parts.check("scales", FLOATS, (groups, outputs))
    for part, dtypes, size in (("g_idx", {"I32"}, shape[1]), ("bias", FLOATS, outputs)):
        if part in parts.infos:
            parts.check(part, dtypes, (size,))
    return shape


def _gptq_rows(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    words, scales = parts.read("qweight"), parts.read("scales").T.astype(np.float32)
    zeros = _gptq_zeros(parts, scheme, unpacked(parts.read("qzeros"), scheme.bits, 1).T[: shape[0]])
    groups = scales.shape[1]
    if "bias" in parts.infos and parts.read("bias").any():
        raise UnsupportedFeatureError(f"{parts.where}: has a bias; no Mistral has biases in its layers.")
    if "g_idx" in parts.infos:
        group = grouped(parts, "g_idx", groups)
    else:
        group = np.arange(shape[1]) // ((scheme.block or (1, None))[1] or shape[1])
    zero, scale = by_column(zeros, group), by_column(scales, group)

    def rows(wanted: slice) -> np.ndarray:
        return (unpacked(words[:, wanted], scheme.bits, 0).T - zero(wanted)) * scale(wanted)

    return rows


def _gptq_matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> PackedMatrix | None:
    size = (scheme.block or (1, None))[1] or shape[1]
    ordered = "g_idx" not in parts.infos or (parts.read("g_idx") == np.arange(shape[1]) // size).all()
    if not ordered or scheme.bits not in (4, 8) or ("bias" in parts.infos and parts.read("bias").any()):
        return None
    zeros = _gptq_zeros(parts, scheme, unpacked(parts.read("qzeros"), scheme.bits, 1).T[: shape[0]]).astype(np.int16)
    numbers = unpacked(parts.read("qweight"), scheme.bits, 0).T
    return _grouped(f"int{scheme.bits}", numbers, parts.read("scales").T, zeros, shape, scheme)


def _gptq_zeros(parts: Parts, scheme: Scheme, stored: np.ndarray) -> np.ndarray:
    """Zero points [out, groups]; where they are all in the middle, they tell whether one was taken off of them.

    Files exist that say version 1 and hold the zero points of version 2 (vllm#26092).
    """
    middle, top = 1 << scheme.bits - 1, (1 << scheme.bits) - 1
    plus_one = scheme.zero_plus_one
    if scheme.symmetric is not False:
        constant = int(stored.flat[0])
        if (stored == constant).all() and constant in (middle, middle - 1):
            plus_one = constant == middle - 1
        elif scheme.symmetric:
            raise CorruptCheckpointError(
                f"{parts.where}: symmetric, but its zero points are not all {middle}, nor all {middle - 1} as version "
                "1 stores them; dequantise it with the program that made it."
            )
    if plus_one and (stored == top).any():
        raise UnsupportedFeatureError(
            f"{parts.where}: a zero point of 0 in version 1, which its writers store in different ways; re-save the "
            "checkpoint as gptq_v2."
        )
    return stored.astype(np.float32) + plus_one


AWQ = Packing(("qweight", "qzeros", "scales"), _awq_shape, _awq_rows, _awq_matrix)
GPTQ = Packing(("qweight", "qzeros", "scales", "g_idx", "bias"), _gptq_shape, _gptq_rows, _gptq_matrix)
