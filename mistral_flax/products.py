"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mistral_core.quantization.matrix import KINDS, ROUNDED_COLUMNS

from . import native
from .programs import by_c, in_one_program

FUSED = 4095
"""The longest contraction that XLA for CPUs runs as one loop over W; a longer one makes it write W out in float32."""
PIECE = 2048
"""The most columns of W in a piece of a longer contraction."""
FEW = 2
"""The most rows that meet a matrix of few bits one by one on a CPU without kernels in C."""
PACKED_ROWS = 16
"""The most rows that are multiplied from packed bytes in C; for more, floats are made of the matrix first."""
ROWS = 256
"""So many rows of W XLA makes floats at once on a CPU: it would first make floats of all the matrices of a program."""
FLOATS_BYTES = 128 << 20
"""The most that is made floats at once in C: a product with all of a matrix is faster than several with parts of it."""


@functools.partial(in_one_program, static_argnames="dtype")
def product(x: Array, weight: Array, bias: Array | None = None, *, dtype: Any = None) -> Array:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    y = _accumulated(x, weight.astype(x.dtype))
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(x.dtype).astype(jnp.float32), y.shape)
    return y.astype(x.dtype if dtype is None else dtype)


class PackedWeight(NamedTuple):
    """A matrix [O, I] of few bits: the fields of `mistral_core.quantization.matrix.PackedMatrix` as arrays."""

    codes: Array
    scale: Array
    zero: Array | None
    kind: str
    shape: tuple[int, int]
    block: tuple[int, int]
    activations: str | None = None
    """int8: what is multiplied is rounded to eight bits first; None: it is taken as it is."""


def packed_product(x: Array, weight: PackedWeight, *, dtype: Any = None) -> Array:
    """x W^T over the last axis of x from the packed bytes, accumulated in float32, in `dtype`: by default that of x.

    Gradients are those of x alone; nothing is kept for them but the packed bytes.
    """
    arrays, layout = tuple(weight[:3]), tuple(weight[3:])
    return _as_a_whole(x, arrays, layout, x.dtype, jnp.dtype(x.dtype if dtype is None else dtype))


def dequantised(weight: PackedWeight, dtype: Any) -> Array:
    """The matrix [O, I] in JAX's own operations, computed in float32 and rounded once."""
    return _dequantised(tuple(weight[:3]), tuple(weight[3:]), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantised(arrays: tuple[Array | None, ...], layout: tuple[Any, ...], dtype: Any) -> Array:
    weight = _weight(arrays, layout)
    parts = [part.astype(dtype) for part in _parts(weight)]
    # XLA for CPUs would compute both halves for each number that it puts in its place
    return _interleaved(jax.lax.optimization_barrier(parts), weight.shape[1])


def _weight(arrays: Sequence[Array | None], layout: tuple[Any, ...]) -> PackedWeight:
    """A matrix of its arrays, of which the last one may be left out, and of the fields after them."""
    codes, scale, *zero = arrays
    assert codes is not None
    assert scale is not None
    return PackedWeight(codes, scale, *(zero or [None]), *layout)


def _parts(weight: PackedWeight) -> list[Array]:
    """The matrix in float32 by the columns that lie together in memory: all, or, of two in a byte, evens and odds."""
    return [
        numbers * _spread(weight.scale.astype(jnp.float32), weight, columns)
        for numbers, columns in zip(_numbers(weight), _columns(weight.kind), strict=True)
    ]


def _columns(kind: str) -> list[slice]:
    """Which columns each of the parts has."""
    return [slice(None)] if KINDS[kind].bits == 8 else [slice(0, None, 2), slice(1, None, 2)]


def _numbers(weight: PackedWeight) -> list[Array]:
    """What the codes mean, less what means 0: float32, part by part."""
    codes, kind = weight.codes, KINDS[weight.kind]
    if weight.kind == "int8":
        numbers = [codes.astype(jnp.float32)]
    elif kind.bits == 8:
        numbers = [jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)]
    elif kind.is_integer:
        numbers = [half.astype(jnp.float32) - 8 for half in (codes & 15, codes >> 4)]
    else:
        numbers = [_chosen(half, kind.values) for half in (codes & 15, codes >> 4)]
    if weight.zero is None:
        return numbers
    zero = weight.zero.astype(jnp.float32)
    return [x - _spread(zero, weight, columns) for x, columns in zip(numbers, _columns(weight.kind), strict=True)]


def _chosen(codes: Array, values: np.ndarray) -> Array:
    """The values of unsigned codes by questions of bit after bit: XLA for CPUs runs them in a loop, no look-up."""
    middle = len(values) // 2
    low, high = (values[0], values[1]) if middle == 1 else (_chosen(codes, half) for half in np.split(values, 2))
    return jnp.where((codes & middle) != 0, high, low)


def _spread(values: Array, weight: PackedWeight, columns: slice) -> Array:
    """The value of its block for every number in some of the columns: repeated, which XLA does within a loop."""
    rows, count, (down, across) = *weight.codes.shape, weight.block
    values = _by_row(values, down, rows)
    if values.shape[1] == 1:
        return jnp.broadcast_to(values, (rows, count))
    step = columns.step or 1
    if across % step:
        values, across, step = jnp.repeat(values, across, axis=1)[:, columns], 1, 1
    values = jnp.repeat(values, across // step, axis=1)[:, :count]
    return jnp.broadcast_to(jnp.pad(values, ((0, 0), (0, count - values.shape[1]))), (rows, count))


def _by_row(values: Array, down: int, rows: int) -> Array:
    """Scales of every row, where one is of several but not of all."""
    return jnp.repeat(values, down, axis=0)[:rows] if values.shape[0] > 1 and down > 1 else values


def _interleaved(parts: list[Array], size: int) -> Array:
    """Parts of the last axis as the one of so many columns that they were."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)[..., :size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _differentiable(x: Array, arrays: tuple[Array | None, ...], layout: tuple[Any, ...], of: Any, dtype: Any) -> Array:
    """The product in `dtype`, whose gradient in x, `of` its dtype, is the product with the matrix as it is."""
    return _packed_product(x, _weight(arrays, layout)).astype(dtype)


def _forward(
    x: Array, arrays: tuple[Array | None, ...], layout: tuple[Any, ...], of: Any, dtype: Any
) -> tuple[Array, tuple[Array | None, ...]]:
    return _packed_product(x, _weight(arrays, layout)).astype(dtype), arrays


def _backward(
    layout: tuple[Any, ...], of: Any, dtype: Any, arrays: tuple[Array | None, ...], gradient: Array
) -> tuple[Array, None]:
    weight = _weight(arrays, layout)
    size, count, rest = _blocks(weight, ROWS)

    def of_rows(start: Any, size: int) -> list[Array]:
        cut = jax.lax.dynamic_slice_in_dim(gradient, start, size, axis=gradient.ndim - 1)
        return [_dot("...o,oi->...i", cut, part) for part in _rounded(_rows(weight, start, size), gradient.dtype)]

    def add(block: Any, parts: list[Array]) -> list[Array]:
        return jax.tree.map(jnp.add, parts, of_rows(block * size, size))

    parts = of_rows(count * size, rest) if rest else of_rows(0, size)
    parts = jax.lax.fori_loop(0 if rest else 1, count, add, parts)
    return _interleaved(parts, weight.shape[1]).astype(of), None


_differentiable.defvjp(_forward, _backward)
# so that a call outside of jit reads the bytes in one loop as well
_as_a_whole = in_one_program(_differentiable, static_argnums=(2, 3, 4))


def _packed_product(x: Array, weight: PackedWeight) -> Array:
    """x W^T in float32 as is fastest for these rows: from the packed bytes, or with floats made of the matrix."""
    arrays, layout = [array for array in weight[:3] if array is not None], tuple(weight[3:])
    if not native.usable():
        return _by_jax(x, *arrays, layout=layout)
    like = jax.ShapeDtypeStruct((*x.shape[:-1], weight.shape[0]), jnp.float32)
    return by_c(_by_kernels, _by_jax, x, *arrays, like=like, layout=layout)


def _by_kernels(x: Array, *arrays: Array, layout: tuple[Any, ...]) -> Array:
    """The product by the kernels in C, of many rows with the floats that they make."""
    codes, scale, zero, kind, shape, block, activations = weight = _weight(arrays, layout)
    if _has_few_rows(x, PACKED_ROWS):
        x = x.astype(jnp.float32)
        return native.product(x, codes, scale, zero, kind=kind, shape=shape, block=block, activations=activations)
    x = x if activations is None else rounded(x)
    return _many_packed_rows(x, weight, in_c=x.dtype in (jnp.float32, jnp.bfloat16))


def _by_jax(x: Array, *arrays: Array, layout: tuple[Any, ...]) -> Array:
    """The product in JAX' own operations."""
    weight = _weight(arrays, layout)
    x = x if weight.activations is None else rounded(x)
    if jax.default_backend() == "cpu" and _has_few_rows(x, FEW):
        rows = x.reshape(-1, x.shape[-1])
        products = [_one_packed_row(rows[i : i + 1], weight) for i in range(len(rows))]
        return jnp.concatenate(products).reshape(*x.shape[:-1], -1)
    return _many_packed_rows(x, weight, in_c=False)


def rounded(x: Array) -> Array:
    """x rounded to eight bits in blocks of columns, as floats: the formula of `reference.quantized.rounded_rows`."""
    codes = []
    for start in range(0, x.shape[-1], ROUNDED_COLUMNS):
        part = x[..., start : start + ROUNDED_COLUMNS].astype(jnp.float32)
        scale = jnp.abs(part).max(-1, keepdims=True) / 127
        seen = scale >= jnp.finfo(jnp.float32).tiny
        codes.append(jnp.where(seen, jnp.rint(part / jnp.where(seen, scale, 1)) * scale, 0))
    return jnp.concatenate(codes, axis=-1).astype(x.dtype)


def _has_few_rows(x: Array, most: int) -> bool:
    """Whether x has at most so many rows; of a program for any number of them, the number is no int."""
    return isinstance(x.size, int) and x.size <= most * x.shape[-1]


def _beside(x: Array, kind: str) -> list[Array]:
    """The columns of x that meet each part of a matrix."""
    columns = _columns(kind)
    if len(columns) > 1 and x.shape[-1] % 2:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    return [x[..., of_part] for of_part in columns]


def _one_packed_row(x: Array, weight: PackedWeight) -> Array:
    """x W^T of a single row [1, I] on a CPU: one loop over the bytes for each part and piece of the contraction."""
    parts = zip(_beside(x, weight.kind), _parts(weight), strict=True)
    return functools.reduce(jnp.add, jax.lax.optimization_barrier([_one_row(of_x, part) for of_x, part in parts]))


def _many_packed_rows(x: Array, weight: PackedWeight, *, in_c: bool) -> Array:
    """x W^T, all of W or some rows of it after others made floats in the dtype of x."""
    pieces = max(-(-weight.shape[0] * weight.shape[1] * x.dtype.itemsize // FLOATS_BYTES), 1)
    size, count, rest = _blocks(weight, -(-weight.shape[0] // pieces) if in_c else ROWS)

    def of_rows(start: Any, size: int) -> Array:
        codes, scale, zero, kind, shape, block, _ = some = _rows(weight, start, size)
        if in_c:
            layout = {"kind": kind, "shape": shape, "block": block}
            # when x is there, or XLA would first make floats of all the matrices of a program
            floats = native.dequantised(codes, scale, zero, **layout, dtype=x.dtype, after=x.ravel()[:1])
            return _dot("...i,oi->...o", x, floats)
        parts = zip(_beside(x, kind), _rounded(some, x.dtype), strict=True)
        return functools.reduce(jnp.add, [_dot("...i,oi->...o", of_x, part) for of_x, part in parts])

    if count == 1:
        products = [of_rows(0, size)]
    else:
        stacked = jax.lax.map(lambda block: of_rows(block * size, size), jnp.arange(count))
        products = [jnp.moveaxis(stacked, 0, -2).reshape(*x.shape[:-1], count * size)]
    return jnp.concatenate(products + ([of_rows(count * size, rest)] if rest else []), axis=-1)


def _blocks(weight: PackedWeight, most: int) -> tuple[int, int, int]:
    """How many rows are made floats at once, how often, and how many are left."""
    rows = weight.shape[0]
    size = min(rows, most) if jax.default_backend() == "cpu" else rows
    return size, *divmod(rows, size)


def _rows(weight: PackedWeight, start: Any, size: int) -> PackedWeight:
    """Some rows of a matrix."""
    rows, (down, across) = weight.shape[0], weight.block
    arrays = [None if array is None else _by_row(array, down, rows) for array in weight[1:3]]
    codes, scale, zero = (
        array if array is None or len(array) == 1 else jax.lax.dynamic_slice_in_dim(array, start, size)
        for array in (weight.codes, *arrays)
    )
    return PackedWeight(codes, scale, zero, weight.kind, (size, weight.shape[1]), (1, across))


def _rounded(weight: PackedWeight, dtype: Any) -> list[Array]:
    """The parts of a matrix in memory, in a dtype: without the barrier XLA for CPUs makes float32 of them once more."""
    return jax.lax.optimization_barrier([part.astype(dtype) for part in _parts(weight)])


def _dot(subscripts: str, x: Array, weight: Array) -> Array:
    """A product accumulated in float32, at full precision on every device."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, weight, precision=precision, preferred_element_type=jnp.float32)


def _accumulated(x: Array, weight: Array) -> Array:
    """x W^T in float32, at full precision on every device."""
    one_row_on_cpu = x.size == x.shape[-1] and jax.default_backend() == "cpu"
    # XLA for CPUs would write a 16-bit W out in float32 first; a long contraction in float32 is fastest as it is
    if one_row_on_cpu and (x.dtype.itemsize == 2 or (x.dtype == jnp.float32 and x.size <= FUSED)):
        return _one_row(x, weight)
    return _dot("...i,oi->...o", x, weight)


@in_one_program  # so that a call outside of jit reads W in one loop as well
def _one_row(x: Array, weight: Array) -> Array:
    """x W^T of a single row on a CPU, in float32: one loop over W for each piece of the contraction."""
    size = x.shape[-1]
    width = size if size <= FUSED else -(-size // -(-size // PIECE))
    # converted before the cut: XLA would round the pieces of a 16-bit W once more, in the loop
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    pieces = [
        jnp.matmul(_computed(x[..., i : i + width]), weight[:, i : i + width].T, precision=jax.lax.Precision.HIGHEST)
        for i in range(0, size, width)
    ]
    # what XLA adds to a product within its loop makes it write W out
    return functools.reduce(jnp.add, jax.lax.optimization_barrier(pieces))


def _computed(x: Array) -> Array:
    """x as an array in memory: XLA would compute what x is made of, such as a norm, again for each row of W."""
    half = x.shape[-1] // 2  # of all that leaves x as it is, a concatenation is what XLA for CPUs does not fuse
    return jnp.concatenate(jax.lax.optimization_barrier([x[..., :half], x[..., half:]]), axis=-1)
