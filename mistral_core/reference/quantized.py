"""What matrices of few bits mean, and how floats become codes, one formula each.

    w[o, i] = (value(code[o, i]) - zero[block]) * scale[block]

Written from the sources named, not from `mistral_core.quantization`, which is compared with it bit for bit. Arrays are
float64. Where the bits of a file hang on what a library rounds in float32, `_float32` is called at exactly that place:
a quotient of two float32 numbers, rounded once from float64, is float32's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ..arrays import Array
from .ops import Round, exact, linear, rounding

if TYPE_CHECKING:
    from ..quantization.matrix import PackedMatrix

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Normal float of four bits: arXiv 2305.14314, appendix E."""
SMALLEST_LARGEST = 1e-38
"""What bitsandbytes' backends/default/ops.py takes for the largest of an nf4 block that is smaller, or all zeros."""
NESTED = 256
"""Scales of nf4 that share a scale: bitsandbytes' functional.quantize_4bit."""
ROUNDED_COLUMNS = 128
"""Columns of activations that share a scale."""

_float32 = rounding("float32")


# What codes mean


def values(kind: str) -> Array:
    """The number that each code stands for, by the code as an unsigned integer."""
    if kind == "nf4":
        return np.array(NF4)
    if kind == "fp8":
        return np.array([eight_bit_float(code) for code in range(256)])
    half = {"int8": 128, "int4": 8}[kind]
    return np.arange(2 * half) - float(half)


def eight_bit_float(code: int) -> float:
    """E4M3 without infinities: a sign, four bits of exponent less 7, three of fraction (arXiv 2209.05433, table 1)."""
    sign, exponent, fraction = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, fraction) == (15, 7):
        return float("nan")
    return sign * (2.0**-6 * fraction / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8))


def unsigned_codes(matrix: PackedMatrix) -> Array:
    """[O, I]: of four bits the low half of a byte is the even column; an int8 number q is code q + 128."""
    columns = matrix.shape[1]
    if matrix.kind == "int8":
        return matrix.codes.astype(int) + 128
    if matrix.kind == "fp8":
        return matrix.codes.astype(int)
    column = np.arange(columns)
    return matrix.codes.astype(int)[:, column // 2] // 16 ** (column % 2) % 16


def codes_of_words(words: Array, bits: int, columns: int) -> Array:
    """[O, I] unsigned codes of compressed-tensors' int32 words: column i of a row begins at bit `bits` * i, low first.

    Source: compressed-tensors 0.20, compressors/pack_quantized/helpers.py, pack_to_int32.
    """
    each, column = 32 // bits, np.arange(columns)
    unsigned = words.astype(np.int64) % 2**32
    return unsigned[:, column // each] // 2 ** (bits * (column % each)) % 2**bits


def codes_of_pairs(pairs: Array, shape: tuple[int, int]) -> Array:
    """[O, I] unsigned codes of bitsandbytes' bytes: rows on end, the first of two numbers in the high half.

    Source: bitsandbytes 0.50, backends/default/ops.py, quantize_4bit.
    """
    number = np.arange(shape[0] * shape[1])
    return (pairs.reshape(-1).astype(int)[number // 2] // 16 ** (1 - number % 2) % 16).reshape(shape)


def dequantised(matrix: PackedMatrix) -> Array:
    """[O, I]: every number, not rounded."""
    rows, columns = matrix.shape
    down, across = np.arange(rows)[:, None] // matrix.block[0], np.arange(columns)[None] // matrix.block[1]
    zero = 0.0 if matrix.zero is None else matrix.zero.astype(np.float64)[down, across]
    return (values(matrix.kind)[unsigned_codes(matrix)] - zero) * matrix.scale.astype(np.float64)[down, across]


def product(x: Array, matrix: PackedMatrix, *, activations: str | None = None, round: Round = exact) -> Array:
    """x W^T with x [..., I] as it is, or rounded to int8."""
    x = np.asarray(x).astype(np.float64)
    return linear(x if activations is None else rounded_rows(x), dequantised(matrix), round=round)


def rounded_rows(x: Array) -> Array:
    """Rows [..., I] of float32 rounded to int8 where `activations` says so: the numbers that the product takes for x.

    In blocks of `ROUNDED_COLUMNS`, the last of which may be shorter: code = x / scale, halves to even, scale = max|x| /
    127. A block whose scale is no normal float32, such as one of zeros, is 0.
    """
    result = np.zeros(x.shape)
    for start in range(0, x.shape[-1], ROUNDED_COLUMNS):
        block = x[..., start : start + ROUNDED_COLUMNS]
        scale = _float32(np.abs(block).max(axis=-1, keepdims=True) / 127)
        seen = scale >= np.finfo(np.float32).tiny
        codes = np.rint(_float32(block / np.where(seen, scale, 1)))
        result[..., start : start + ROUNDED_COLUMNS] = np.where(seen, codes * scale, 0)
    return result


def parameters(floats: Mapping[str, Array], packed: Mapping[str, PackedMatrix]) -> dict[str, Array]:
    """The parameters of a model of which some are packed, as the other functions of the specification take them."""
    return {**floats, **{name: dequantised(matrix) for name, matrix in packed.items()}}


# How floats become codes


def integer_scales(w: Array, bits: int, group: int, symmetric: bool, dtype: Any) -> tuple[Array, Array | None]:
    """Scales [O, I / group] as they are stored, and zero points where the least number has a code of its own.

    Symmetric: max|w| / ((2^bits - 1) / 2). Else (max - min) / (2^bits - 1), where 0 lies between min and max, and the
    zero point is -2^(bits-1) - min / scale. The scale is rounded to its dtype first, and is that dtype's eps where it
    is 0. Source: compressed-tensors 0.20, quantization/utils/helpers.py, calculate_qparams.
    """
    groups = w.astype(np.float64).reshape(len(w), -1, group)
    steps, half = 2**bits - 1, 2 ** (bits - 1)
    least, most = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    if symmetric:
        scale = _float32(np.maximum(-least, most) / (steps / 2)).astype(dtype)
    else:
        scale = _float32(_float32(most - least) / steps).astype(dtype)
    scale = np.where(scale == 0, ml_dtypes.finfo(dtype).eps, scale.astype(np.float64))
    zero = np.rint(np.clip(_float32(-half - _float32(least / scale)), -half, half - 1))
    return scale, None if symmetric else zero


def integer_codes(w: Array, bits: int, group: int, scale: Array, zero: Array | None) -> Array:
    """[O, I] unsigned: the integer nearest to w / scale + zero, halves to even, plus 2^(bits-1).

    Source: compressed-tensors 0.20, quantization/lifecycle/forward_helpers.py, _quantize, in float32.
    """
    half = 2 ** (bits - 1)
    quotient = _float32(w.astype(np.float64).reshape(len(w), -1, group) / scale[..., None])
    shifted = quotient if zero is None else _float32(quotient + zero[..., None])
    return (np.clip(np.rint(shifted), -half, half - 1) + half).astype(int).reshape(w.shape)


def nf4_scales(w: Array, group: int) -> Array:
    """[O, I / group]: the largest |w| of each block (arXiv 2305.14314, section 3)."""
    return np.abs(w.astype(np.float64)).reshape(len(w), -1, group).max(axis=-1)


def nf4_codes(w: Array, group: int, scale: Array) -> Array:
    """[O, I] unsigned: the value nearest to w * (1 / scale); of a number in the middle of two, the lower.

    Source: bitsandbytes 0.50, backends/default/ops.py, quantize_4bit: it multiplies by the inverse.
    """
    inverse = _float32(1 / np.maximum(scale, _float32(np.array(SMALLEST_LARGEST))))
    x = _float32(w.astype(np.float64).reshape(len(w), -1, group) * inverse[..., None])
    middles = _float32(_float32(values("nf4")[:-1] + values("nf4")[1:]) / 2)
    return (x[..., None] > middles).sum(axis=-1).reshape(w.shape)


def nested_values() -> Array:
    """What the 256 codes of nf4's scales mean, in order: 0, 1, and of seven decades the middles of 2^k parts each.

    Source: bitsandbytes' functional.create_dynamic_map (arXiv 2110.02861, section 2.1). Its edges are torch.linspace's:
    steps of float32 from the nearer end, each sum rounded once.
    """
    found, first = [0.0, 1.0], float(np.float32(0.1))
    for k in range(7):
        step, number = float(_float32(np.array(1 - first))) / 2**k, np.arange(2**k + 1)
        edges = _float32(np.where(2 * number < 2**k, first + step * number, 1 - step * (2**k - number)))
        middles = _float32(_float32(edges[1:] + edges[:-1]) / 2)
        decade = _float32(middles * _float32(np.array(10.0 ** (k - 6))))
        found += [*decade, *-decade]
    return np.sort(np.array(found))


def nested(scale: Array) -> tuple[Array, Array, float]:
    """Codes, scales of 256 of them, and the mean that is taken off first (bitsandbytes' functional.quantize_4bit)."""
    flat = scale.reshape(-1)
    offset = float(_float32(flat.mean()))
    codes, outer, table = [], [], nested_values()
    middles = _float32(_float32(table[:-1] + table[1:]) / 2)
    for start in range(0, flat.size, NESTED):
        block = _float32(flat[start : start + NESTED] - offset)
        outer.append(np.abs(block).max())
        x = _float32(block / (outer[-1] or 1.0))
        codes.append((x[:, None] > middles).sum(axis=-1))
    return np.concatenate(codes), np.array(outer), offset


def unnested(codes: Array, outer: Array, offset: float) -> Array:
    """The scales that are kept: value(code) * outer + offset, in float32."""
    return _float32(_float32(nested_values()[codes] * outer[np.arange(codes.size) // NESTED]) + offset)
