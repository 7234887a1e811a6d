"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys, where there is one CPU and nothing else. It is
an operation of JAX' own kind, which is differentiated as the formula is, and is the formula where a program is made for
other processors or for a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mistral_core.native import attention, library

from . import native
from .programs import in_one_program

LEAST = 64
"""The fewest queries of each row for which C is asked: it packs all keys first."""

Formula = Callable[..., Array]
"""The same of queries, keys, values, the orders of both and documents or none, in JAX' own operations."""


def is_for_c(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> bool:
    """Whether C may compute the attention of arrays: enough queries, of its types, where nobody misses anything."""
    known = all(isinstance(size, int) for size in (*q_BTNH.shape, *k_BSKH.shape))
    if not known or q_BTNH.shape[1] < LEAST or len({x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}) > 1:
        return False
    type = library.TYPES.get(jnp.dtype(q_BTNH.dtype).name, -1)
    return attention.available(type, q_BTNH.shape[3]) and native.usable()


@functools.partial(in_one_program, static_argnames=("window", "formula"))
def attend_in_c(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, query_order_BT: Array, key_order_BS: Array, *, window: int | None,
    document_ids_BT: Array | None = None, formula: Formula,
) -> Array:  # fmt: skip
    """softmax(q k / sqrt(H)) v [B, T, N, H], zeros where nothing is seen, for arrays of which `is_for_c` is true."""
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    numbers = (
        jnp.broadcast_to(x.astype(jnp.int32), shape)
        for x, shape in ((query_order_BT, (B, T)), (key_order_BS, (B, S)), (document_ids_BT, (B, S)))
        if x is not None
    )
    return _attend.bind(q_BTNH, k_BSKH, v_BSKH, *numbers, window=window, formula=formula)


_attend = Primitive("mistral_attend")


@_attend.def_impl
def _formula(*arrays: Array, window: int | None, formula: Formula) -> Array:
    return formula(*arrays, window=window)


@_attend.def_abstract_eval
def _shape(q_BTNH: Any, *_: Any, window: int | None, formula: Formula) -> Any:
    return q_BTNH


def _differentiated(
    arrays: tuple[Array, ...], tangents: tuple[Any, ...], *, window: int | None, formula: Formula
) -> tuple[Array, Array]:
    """The derivative is the formula's, for which nothing but the arrays is kept; orders have none."""

    @jax.checkpoint
    def of(*floats: Array) -> Array:
        return formula(*floats, *arrays[3:], window=window)

    _, tangent = jax.jvp(of, arrays[:3], tuple(map(ad.instantiate_zeros, tangents[:3])))
    return _attend.bind(*arrays, window=window, formula=formula), tangent


def _mapped(
    arrays: tuple[Array, ...], axes: tuple[int | None, ...], *, window: int | None, formula: Formula
) -> tuple[Array, int]:
    """What is mapped is more rows of the batch."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    first = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    y = _attend.bind(*(x.reshape(-1, *x.shape[2:]) for x in first), window=window, formula=formula)
    return y.reshape(size, -1, *y.shape[1:]), 0


_as_formula = mlir.lower_fun(_formula, multiple_results=False)


def _in_c(context: Any, *arrays: Any, window: int | None, formula: Formula) -> Any:
    """A call of C in what is run here; a program for a file knows no function of ours."""
    if context.module_context.lowering_parameters.for_export:
        return _as_formula(context, *arrays, window=window, formula=formula)
    numbers = np.array([-1 if window is None else window], np.int64)
    return jax.ffi.ffi_lowering("mistral_attend")(context, *arrays, numbers=numbers)


ad.primitive_jvps[_attend] = _differentiated
batching.primitive_batchers[_attend] = _mapped
mlir.register_lowering(_attend, _as_formula)
mlir.register_lowering(_attend, _in_c, platform="cpu")
