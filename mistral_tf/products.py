"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.quantization.matrix import KINDS, ROUNDED_COLUMNS

from . import native
from .traces import sizes

_XLA_COLUMNS = 2048
"""The longest contraction that XLA on CPU does from bfloat16 weights as they are; for others it copies to float32."""
_XLA_PACKED_COLUMNS = 4096
"""The same from what stands in one byte or half of it."""
_FEW_ROWS = 2
"""The most rows that are multiplied one by one from packed codes without kernels in C."""
PACKED_ROWS = 16
"""The most rows that are multiplied from packed bytes in C; for more, floats are made of the matrix first."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: Any = None) -> Tensor:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    dtype = tf.as_dtype(dtype or x.dtype)
    x_RI = tf.reshape(x, [-1, weight.shape[1]])
    y_RO = _rows(x_RI, tf.convert_to_tensor(weight), dtype if bias is None else tf.float32)
    y = tf.reshape(y_RO, [*sizes(x)[:-1], weight.shape[0]])
    return y if bias is None else tf.cast(y + tf.cast(bias, tf.float32), dtype)


class PackedWeight(NamedTuple):
    """A matrix [O, I] of few bits: the fields of `mistral_core.quantization.matrix.PackedMatrix` as tensors."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    kind: str
    shape: tuple[int, int]
    block: tuple[int, int]
    activations: str | None = None
    """int8: what is multiplied is rounded to eight bits first; None: it is taken as it is."""


def packed_product(x: Tensor, weight: PackedWeight, *, dtype: Any = None) -> Tensor:
    """x W^T over the last axis of x from the packed bytes, accumulated in float32, in `dtype`: by default that of x.

    Gradients are those of x alone; nothing is kept for them but the packed bytes.
    """
    dtype = tf.as_dtype(dtype or x.dtype)

    @tf.custom_gradient
    def rows(x_RI: Tensor) -> Any:
        def gradient(upstream_RO: Tensor) -> Tensor:
            return tf.cast(tf.matmul(upstream_RO, _made_floats(upstream_RO, weight, upstream_RO.dtype)), x_RI.dtype)

        return _packed_rows(x_RI, weight, dtype), gradient

    y_RO = rows(tf.reshape(x, [-1, weight.shape[1]]))
    return tf.reshape(y_RO, [*sizes(x)[:-1], weight.shape[0]])


def as_floats(weight: Tensor | PackedWeight, x_RI: Tensor) -> Tensor:
    """A matrix [O, I] in float32 for a moment, packed or not, made when x is there."""
    return _made_floats(x_RI, weight, tf.float32) if isinstance(weight, PackedWeight) else tf.cast(weight, tf.float32)


def dequantised(weight: PackedWeight, dtype: Any) -> Tensor:
    """The matrix [O, I] in TensorFlow's own operations, computed in float32 and rounded once."""
    dtype = tf.as_dtype(dtype)
    if not native.is_on_cpu():
        return _in_order([tf.cast(numbers, dtype) for _, numbers in _parts(weight)], weight)
    floats = _xla(_floats, _form(weight), dtype)(*weight[:3])
    if floats.dtype == dtype:
        return floats
    return tf.reshape(tf.bitcast(floats, dtype), [weight.shape[0], -1])[:, : weight.shape[1]]


def _packed_rows(x_RI: Tensor, weight: PackedWeight, dtype: Any) -> Tensor:
    """x W^T in `dtype` as is fastest for these rows, where tracing knows them: from packed bytes, or with floats."""
    codes, scale, zero, kind, shape, block, activations = weight
    in_c = native.usable() and tf.float64 not in (x_RI.dtype, dtype)
    if in_c and x_RI.shape[0] is not None and x_RI.shape[0] <= PACKED_ROWS:
        x_RI = tf.cast(x_RI, tf.float32)
        y_RO = native.product(x_RI, codes, scale, zero, kind=kind, shape=shape, block=block, activations=activations)
        return tf.cast(y_RO, dtype)
    if activations is not None:
        x_RI = rounded(x_RI)
    most = _FEW_ROWS if KINDS[weight.kind].is_integer else 1
    few = x_RI.shape[0] is not None and x_RI.shape[0] <= most
    if few and native.is_on_cpu() and tf.float64 not in (x_RI.dtype, dtype):
        return tf.cast(_packed_few_rows(tf.cast(x_RI, tf.float32), weight), dtype)
    kept = x_RI.dtype if dtype == tf.float32 and x_RI.dtype != tf.float64 and not in_c else dtype
    return _rows(x_RI, _made_floats(x_RI, weight, kept), dtype)


def _made_floats(x_RI: Tensor, weight: PackedWeight, dtype: Any) -> Tensor:
    """The matrix [O, I] for a moment, made by the kernels in C where they are.

    When x is there, or a program would first make floats of all its matrices.
    """
    with tf.control_dependencies([x_RI]):
        if dtype in (tf.float32, tf.bfloat16) and native.usable():
            codes, scale, zero, kind, shape, block, _ = weight
            return native.dequantised(codes, scale, zero, kind=kind, shape=shape, block=block, dtype=dtype)
        return dequantised(weight, dtype)


def rounded(x: Tensor) -> Tensor:
    """x rounded to eight bits in blocks of columns, as floats: the formula of `reference.quantized.rounded_rows`."""
    codes = []
    for start in range(0, x.shape[-1], ROUNDED_COLUMNS):
        part = tf.cast(x[..., start : start + ROUNDED_COLUMNS], tf.float32)
        scale = tf.reduce_max(tf.abs(part), -1, keepdims=True) / 127
        seen = scale >= np.finfo(np.float32).tiny
        codes.append(tf.where(seen, tf.round(part / tf.where(seen, scale, 1.0)) * scale, 0.0))
    return tf.cast(tf.concat(codes, -1), x.dtype)


def _packed_few_rows(x_RI: Tensor, weight: PackedWeight) -> Tensor:
    """x W^T in float32 from the codes as they are: a scale of a whole row comes after its sum."""
    last = weight.scale.shape[1] == 1
    scale = tf.ones([1, 1]) if last else weight.scale
    sums = _xla(_sums, _form(weight))(x_RI, weight.codes, scale, weight.zero)
    y_RO = tf.concat([tf.add_n(of_row) for of_row in sums], 0)
    return y_RO * tf.transpose(_spread(weight.scale, weight)) if last else y_RO


def _parts(weight: PackedWeight) -> list[tuple[slice, Tensor]]:
    """The matrix in float32 as it is packed, with the columns of each part: of 4 bits the even ones and the odd."""
    kind, size = KINDS[weight.kind], weight.shape[1]
    if kind.bits == 8:
        halves = [(slice(0, None, 1), weight.codes)]
    else:
        codes = tf.cast(weight.codes, tf.int32)
        halves = [
            (slice(0, None, 2), codes & 15),
            (slice(1, None, 2), tf.bitwise.right_shift(codes, 4)[:, : size // 2]),
        ]
    parts = []
    for columns, codes in halves:
        if kind.is_integer:
            numbers = tf.cast(codes if kind.bits == 8 else codes - 8, tf.float32)
        else:
            numbers = tf.gather(tf.constant(kind.values), tf.cast(codes, tf.int32))
        if weight.zero is not None:
            numbers -= _spread(weight.zero, weight, columns)
        parts.append((columns, numbers * _spread(weight.scale, weight, columns)))
    return parts


def _spread(values: Tensor, weight: PackedWeight, columns: slice = slice(0, None, 1)) -> Tensor:
    """The value of its block for every number of some columns, in float32; what all share stands once."""
    values, (rows, size), (high, wide) = tf.cast(values, tf.float32), weight.shape, weight.block
    if values.shape[0] > 1 and high > 1:
        values = tf.repeat(values, high, 0)[:rows]
    if values.shape[1] == 1:
        return values
    if wide % columns.step:
        return tf.repeat(values, wide, 1)[:, :size][:, columns]
    return tf.repeat(values, wide // columns.step, 1)[:, : len(range(size)[columns])]


def _in_order(parts: list[Tensor], weight: PackedWeight) -> Tensor:
    """The matrix [O, I] of its parts."""
    if len(parts) == 1:
        return parts[0]
    even, odd = parts
    odd = tf.pad(odd, [[0, 0], [0, even.shape[1] - odd.shape[1]]])
    return tf.reshape(tf.stack([even, odd], -1), [weight.shape[0], -1])[:, : weight.shape[1]]


def _rows(x_RI: Tensor, weight_OI: Tensor, dtype: Any) -> Tensor:
    """x W^T in `dtype`, as is fastest for these dtypes and this number of rows, where tracing knows it."""
    on_cpu = native.is_on_cpu()
    if on_cpu and x_RI.shape[0] == 1 and x_RI.dtype == weight_OI.dtype == tf.bfloat16:
        # twice the reading is faster than a float32 copy, which a float32 result needs otherwise
        readings = -(-weight_OI.shape[1] // _XLA_COLUMNS)
        if readings <= (2 if dtype == tf.float32 else 1) and weight_OI.shape[1] % readings == 0:
            return tf.cast(_xla_row(x_RI, weight_OI, readings), dtype)
    x_RI, weight_OI = tf.cast(x_RI, dtype), tf.cast(weight_OI, dtype)
    if on_cpu and x_RI.shape[0] != 1:  # in float32 MatMul takes up to 4 times as long as BatchMatMul
        y_1RO = tf.matmul(tf.expand_dims(x_RI, 0), tf.expand_dims(weight_OI, 0), transpose_b=True)
        return tf.squeeze(y_1RO, 0)
    return tf.matmul(x_RI, weight_OI, transpose_b=True)


@tf.function(jit_compile=True, autograph=False)
def _xla_row(x_1I: Tensor, weight_OI: Tensor, readings: int) -> Tensor:
    """x W^T [1, O] of bfloat16 in float32: each piece of x meets all of W, seen as rows of the piece's length."""
    out, columns = weight_OI.shape
    rows = tf.cast(tf.reshape(weight_OI, [out * readings, columns // readings]), tf.float32)
    pieces = tf.split(tf.cast(x_1I, tf.float32), readings, axis=1)
    return tf.add_n([tf.matmul(x, rows, transpose_b=True)[:, i::readings] for i, x in enumerate(pieces)])


_PAIRS = {tf.bfloat16: (tf.uint16, tf.uint32), tf.float16: (tf.uint16, tf.uint32), tf.float32: (tf.uint32, tf.uint64)}
"""A dtype -> that of its bits, and that of the bits of two."""


def _floats(form: PackedWeight, dtype: Any, *tensors: Tensor | None) -> Tensor:
    """The matrix [O, I] in `dtype`, or the bits of two columns as one integer, which XLA writes faster than in turn."""
    parts = [tf.cast(numbers, dtype) for _, numbers in _parts(PackedWeight(*tensors, *form[3:]))]
    if len(parts) == 1 or dtype not in _PAIRS:
        return _in_order(parts, form)
    one, two = _PAIRS[dtype]
    odd = tf.pad(parts[1], [[0, 0], [0, form.shape[1] % 2]])
    low, high = (tf.cast(tf.bitcast(numbers, one), two) for numbers in (parts[0], odd))
    return low | tf.bitwise.left_shift(high, tf.constant(8 * one.size, two))


def _sums(form: PackedWeight, x_RI: Tensor, *tensors: Tensor | None) -> list[list[Tensor]]:
    """What adds up to each row [1, O] of x W^T: with nothing done to it after, XLA reads codes within its sum."""
    sums: list[list[Tensor]] = [[] for _ in range(x_RI.shape[0])]
    for start, piece in _pieces(PackedWeight(*tensors, *form[3:])):
        for columns, numbers in _parts(piece):
            for row, of_row in enumerate(sums):
                x_1I = x_RI[row : row + 1, start : start + piece.shape[1]][:, columns]
                of_row.append(tf.matmul(x_1I, numbers, transpose_b=True))
    return sums


def _pieces(weight: PackedWeight) -> Iterator[tuple[int, PackedWeight]]:
    """The matrix in pieces short enough for XLA, of whole blocks, with the first column of each."""
    (rows, columns), (high, wide) = weight.shape, weight.block
    count = -(-columns * KINDS[weight.kind].bits // (8 * _XLA_PACKED_COLUMNS))
    of_one_scale = weight.scale.shape[1] == 1
    step = 2 if of_one_scale else math.lcm(wide, 2)
    length = -(-columns // (count * step)) * step
    for start in range(0, columns, length):
        stop = min(start + length, columns)
        blocks = slice(None) if of_one_scale else slice(start // wide, -(-stop // wide))
        codes = weight.codes[:, start:stop]
        if KINDS[weight.kind].bits == 4:
            codes = weight.codes[:, start // 2 : -(-stop // 2)]
        zero = None if weight.zero is None else weight.zero[:, blocks]
        shape, block = (rows, stop - start), (high, min(wide, stop - start))
        yield start, PackedWeight(codes, weight.scale[:, blocks], zero, weight.kind, shape, block)


def _form(weight: PackedWeight) -> PackedWeight:
    """All of a matrix but its tensors."""
    return weight._replace(codes=None, scale=None, zero=None)


@functools.cache
def _xla(function: Callable[..., Any], *form: Any) -> Any:
    """The function for matrices of one form, compiled: TensorFlow warns of one that is traced for many."""
    return tf.function(functools.partial(function, *form), jit_compile=True, autograph=False)
