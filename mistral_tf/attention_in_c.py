"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys, forth and back. It is the formula in a program
that is saved or that XLA compiles, and in gradients of gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from mistral_core.native import attention, library

from . import native
from .traces import sizes

LEAST = 64
"""The fewest queries of each row for which C is asked: it packs all keys first."""

Formula = Callable[..., Tensor]
"""The same of queries, keys, values, the orders of both and documents or none, in TensorFlow's own operations."""


def is_for_c(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> bool:
    """Whether C may compute the attention of tensors: enough queries, of its types, where nobody misses anything."""
    if len({x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}) > 1 or (q_BTNH.shape[1] or 0) < LEAST:
        return False
    type = library.TYPES.get(q_BTNH.dtype.name, -1)
    return attention.available(type, q_BTNH.shape[3]) and native.usable()


def attend_in_c(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, query_order_BT: Tensor, key_order_BS: Tensor, *, window: int | None,
    document_ids_BT: Tensor | None = None, formula: Formula,
) -> Tensor:  # fmt: skip
    """softmax(q k / sqrt(H)) v [B, T, N, H], zeros where nothing is seen, for tensors of which `is_for_c` is true."""
    (B, T), S = sizes(q_BTNH)[:2], sizes(k_BSKH)[1]
    numbers = [
        tf.broadcast_to(tf.cast(x, tf.int32), shape)
        for x, shape in ((query_order_BT, [B, T]), (key_order_BS, [B, S]), (document_ids_BT, [B, S]))
        if x is not None
    ]
    shown = {"window": -1 if window is None else window}
    others = (*numbers[:2], numbers[2:])

    def by_formula(*floats: Tensor) -> Tensor:
        return formula(*floats, *numbers, window=window)

    @tf.custom_gradient
    def attended(*floats: Tensor) -> tuple[Tensor, Callable[..., Sequence[Tensor]]]:
        y_BTNH = native.operations().mistral_attend(*floats, *others, **shown)
        return y_BTNH, lambda upstream_BTNH: gradients(*floats, y_BTNH, upstream_BTNH)

    @tf.custom_gradient
    def gradients(*given: Tensor) -> tuple[Sequence[Tensor], Callable[..., Sequence[Tensor | None]]]:
        *floats, _, upstream_BTNH = given

        def again(*upstream: Tensor) -> Sequence[Tensor | None]:
            once = functools.partial(_gradients, by_formula)
            *of_floats, of_upstream = _gradients(lambda *x: once(x[:3], x[3]), (*floats, upstream_BTNH), upstream)
            return (*of_floats, None, of_upstream)

        return tuple(native.operations().mistral_attention_gradients(*given, *others, **shown)), again

    return attended(q_BTNH, k_BSKH, v_BSKH)


def _gradients(function: Callable[..., Any], floats: Sequence[Tensor], upstream: Any) -> Sequence[Tensor]:
    """The gradients of a function's results in its arguments."""
    with tf.GradientTape() as tape:
        tape.watch(floats)
        found = function(*floats)
    return tape.gradient(found, list(floats), upstream)
