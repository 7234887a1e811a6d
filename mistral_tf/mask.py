"""Who sees whom: the one formula, of a whole text, of a block of a long one, and of a single pair."""

from __future__ import annotations

import tensorflow as tf
from tensorflow import Tensor


def in_window(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key, by their orders: it is one of the W real tokens up to the query; None: of all."""
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible = visible & (query - key < window)
    return visible


def mask(
    query_order_BT: Tensor,
    key_order_BS: Tensor,
    window: int | None,
    documents: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, T, S] bool: a query sees the W keys up to itself, counted in real tokens, of its own document.

    Orders are those of `Visibility`; documents are the ids [B, T] of queries and [B, S] of keys.
    """
    visible = in_window(tf.expand_dims(query_order_BT, 2), tf.expand_dims(key_order_BS, 1), window)
    if documents is not None:
        of_queries, of_keys = documents
        visible = visible & (tf.expand_dims(of_queries, 2) == tf.expand_dims(of_keys, 1))
    return visible
