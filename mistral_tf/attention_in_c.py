"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys. Its gradient is the formula's, and it is the
formula in a program that is saved or that XLA compiles.
"""

from __future__ import annotations

from collections.abc import Callable

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
    shown = -1 if window is None else window

    @tf.custom_gradient
    def attended(*floats: Tensor) -> tuple[Tensor, Callable[..., list[Tensor]]]:
        def gradient(upstream_BTNH: Tensor) -> list[Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(floats)
                o_BTNH = formula(*floats, *numbers, window=window)
            return tape.gradient(o_BTNH, list(floats), upstream_BTNH)

        return native.operations().mistral_attend(*floats, *numbers[:2], numbers[2:], window=shown), gradient

    return attended(q_BTNH, k_BSKH, v_BSKH)
