"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys, where there is one CPU and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mistral_core.native import attention, library

from . import native
from .programs import Function, by_c, in_one_program

LEAST = 64
"""The fewest queries of each row for which C is asked: it packs all keys first."""


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
    document_ids_BT: Array | None = None, formula: Function,
) -> Array:  # fmt: skip
    """softmax(q k / sqrt(H)) v [B, T, N, H], zeros where nothing is seen, for arrays of which `is_for_c` is true.

    `formula` gives the same of queries, keys, values, the orders of both and documents or none, in JAX' own operations.
    """
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    numbers = (
        jnp.broadcast_to(x.astype(jnp.int32), shape)
        for x, shape in ((query_order_BT, (B, T)), (key_order_BS, (B, S)), (document_ids_BT, (B, S)))
        if x is not None
    )
    like = jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)
    arrays = (q_BTNH, k_BSKH, v_BSKH, *numbers)
    return by_c(_attended, formula, *arrays, like=like, gradient=_gradient, window=window)


def _attended(*arrays: Array, window: int | None) -> Array:
    return _call("mistral_attend", arrays, arrays[:1], window)[0]


def _gradient(upstream_BTNH: Array, y_BTNH: Array, *arrays: Array, window: int | None) -> tuple[Array, ...]:
    """The gradients of queries, keys and values."""
    floats, numbers = arrays[:3], arrays[3:]
    return _call("mistral_attention_gradients", (*floats, y_BTNH, upstream_BTNH, *numbers), floats, window)


def _call(name: str, arrays: Sequence[Array], like: Sequence[Array], window: int | None) -> tuple[Array, ...]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    call = jax.ffi.ffi_call(name, results, vmap_method="sequential")
    return tuple(call(*arrays, numbers=np.array([-1 if window is None else window], np.int64)))
