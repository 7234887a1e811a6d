"""Attention: who sees whom, the formula, and the fused kernels that compute the same.

Axis letters are those of the legend in `mistral_core.config`.

Every implementation takes q [B, T, N, H], k and v [B, S, K, H] and who sees whom, and returns the output [B, T, N, H]
and, where it has them, the weights [B, N, T, S]. TensorFlow has no fused kernel that takes such a mask.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from mistral_core.errors import UnsupportedFeatureError

from .attention_in_c import attend_in_c, is_for_c
from .blocks import Blocks, attend_by_blocks, cut
from .mask import mask
from .traces import sizes


class Visibility(NamedTuple):
    """Who sees whom: what an attention mask is made of."""

    query_order_BT: Tensor
    """[B, T]: the number of real tokens before each query in its row, -1 for padding."""
    key_order_BS: Tensor
    """[B, S]: the same of each key."""
    window: int | None = None
    """How many keys a query sees, itself included; None: all."""
    document_ids_BT: Tensor | None = None
    """[B, T]: the packed document of each token, where queries and keys are the same tokens."""
    mask_BTS: Tensor | None = None
    """The mask where it is made already, for several layers."""
    blocks: Blocks | None = None
    """How a long text is cut."""


def attention_mask(visibility: Visibility) -> Tensor:
    """[B, T, S] bool: a query sees the W keys up to itself, counted in real tokens, of its own document."""
    query_order_BT, key_order_BS, window, document_ids_BT, mask_BTS, _ = visibility
    if mask_BTS is not None:
        return mask_BTS
    documents = None if document_ids_BT is None else (document_ids_BT, document_ids_BT)
    return mask(query_order_BT, key_order_BS, window, documents)


def prepared(visibility: Visibility, implementation: str) -> Visibility:
    """The same, with what layers share made: the mask, or the blocks of a long text, where attention reads them."""
    if implementation in BY_BLOCKS:
        blocks = cut(*visibility[:4], always=implementation == "blocked")
        if blocks is not None:
            return visibility._replace(blocks=blocks)
    return visibility._replace(mask_BTS=attention_mask(visibility)) if implementation in MASKED else visibility


def attend(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    visibility: Visibility,
    *,
    implementation: str = "eager",
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(H)) v [B, T, N, H], and the weights [B, N, T, S] where the implementation has them."""
    if seed is None:
        dropout = 0.0
    if implementation == DEFAULT and not dropout and is_for_c(q_BTNH, k_BSKH, v_BSKH):
        *orders, window, document_ids_BT = visibility[:4]
        told = {"window": window, "document_ids_BT": document_ids_BT}
        return attend_in_c(q_BTNH, k_BSKH, v_BSKH, *orders, **told, formula=_formula), None
    return ATTENTION[implementation](q_BTNH, k_BSKH, v_BSKH, visibility, dropout, seed)


def _formula(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, query_order_BT: Tensor, key_order_BS: Tensor,
    document_ids_BT: Tensor | None = None, *, window: int | None,
) -> Tensor:  # fmt: skip
    """What C computes, in TensorFlow's own operations."""
    visibility = prepared(Visibility(query_order_BT, key_order_BS, window, document_ids_BT), DEFAULT)
    return attend_sdpa(q_BTNH, k_BSKH, v_BSKH, visibility, 0.0, None)[0]


def attend_eager(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The formula: scores and softmax in float32, weights in the dtype of v."""
    N, H = q_BTNH.shape[2:]
    K = k_BSKH.shape[2]
    visible_BTS = attention_mask(visibility)
    B, T, S = sizes(visible_BTS)
    q_BTKGH = tf.reshape(tf.cast(q_BTNH, tf.float32), [B, T, K, N // K, H])
    scores = tf.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, tf.cast(k_BSKH, tf.float32)) * H**-0.5
    visible = tf.reshape(visible_BTS, [B, 1, 1, T, S])
    # the lowest float, not -inf: a row that sees nothing stays finite, in its gradient too
    weights = tf.nn.softmax(tf.where(visible, scores, scores.dtype.min), axis=-1)
    weights = tf.cast(tf.where(visible, weights, 0), v_BSKH.dtype)
    dropped = tf.nn.experimental.stateless_dropout(weights, dropout, seed) if dropout else weights
    o_BTKGH = tf.einsum("BKGTS,BSKH->BTKGH", dropped, v_BSKH)
    return tf.reshape(o_BTKGH, [B, T, N, H]), tf.reshape(weights, [B, N, T, S])


def attend_sdpa(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, visibility: Visibility, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The formula, of a long text by blocks of queries, whose weights it does not return."""
    blocks = visibility.blocks
    whole = functools.partial(attend_eager, q_BTNH, k_BSKH, v_BSKH, visibility, dropout, seed)
    if blocks is None:
        return whole()

    def by_blocks() -> Tensor:
        return attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, blocks, _of_block, dropout=dropout, seed=seed)

    return by_blocks() if blocks.is_long is None else tf.cond(blocks.is_long, by_blocks, lambda: whole()[0]), None


def _of_block(
    q_BCNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BCS: Tensor, dropout: float, seed: Tensor | None
) -> Tensor:
    """The output of a block's queries."""
    nobody = tf.zeros([1, 0], tf.int32)
    return attend_eager(q_BCNH, k_BSKH, v_BSKH, Visibility(nobody, nobody, mask_BTS=mask_BCS), dropout, seed)[0]


ATTENTION = {"eager": attend_eager, "sdpa": attend_sdpa, "blocked": attend_sdpa}
DEFAULT = "sdpa"
ALIASES: dict[str, str] = {}
MASKED = ("eager", "sdpa", "blocked")
"""Those that read the mask."""
BY_BLOCKS = ("sdpa", "blocked")
"""Those that take a long text by blocks of queries: where that pays, and always."""


def check_implementation(implementation: str | None) -> str:
    """The name of an attention implementation that runs here; None is the default.

    Raises UnsupportedFeatureError for an unknown one.
    """
    name = DEFAULT if implementation is None else ALIASES.get(implementation, implementation)
    if name not in ATTENTION:
        raise UnsupportedFeatureError(
            f"attn_implementation must be one of {', '.join(ATTENTION)}, got {implementation!r}."
        )
    return name


def available() -> tuple[str, ...]:
    """The attention implementations that run here."""
    return tuple(ATTENTION)
