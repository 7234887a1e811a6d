"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

FUSED = 4095
"""The longest contraction that XLA for CPUs runs as one loop over W; a longer one makes it write W out in float32."""
PIECE = 2048
"""The most columns of W in a piece of a longer contraction."""


def product(x: Array, weight: Array, bias: Array | None = None, *, dtype: Any = None) -> Array:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    y = _accumulated(x, weight.astype(x.dtype))
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(x.dtype).astype(jnp.float32), y.shape)
    return y.astype(x.dtype if dtype is None else dtype)


def _accumulated(x: Array, weight: Array) -> Array:
    """x W^T in float32, at full precision on every device."""
    one_row_on_cpu = x.size == x.shape[-1] and jax.default_backend() == "cpu"
    # XLA for CPUs would write a 16-bit W out in float32 first; a long contraction in float32 is fastest as it is
    if one_row_on_cpu and (x.dtype.itemsize == 2 or (x.dtype == jnp.float32 and x.size <= FUSED)):
        return _one_row(x, weight)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, inline=True)  # so that a call outside of jit reads W in one loop as well
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
