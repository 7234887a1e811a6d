"""The mathematics of Mistral, one function a formula, in the order a token meets them.

Arrays are float64; their axis letters are those of the legend in `mistral_core.config`. A model in lower precision
rounds at fixed places; `round` is called at exactly these, so the reference also says what a bfloat16 model returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..config.rope import query_scaling, rotary_table

Round = Callable[[Array], Array]


def exact(x: Array) -> Array:
    """No rounding: the specification itself."""
    return x


def rounding(dtype: str) -> Round:
    """Round to the nearest value of a lower precision, ties to even, and keep computing in float64."""
    kind = {
        "bfloat16": ml_dtypes.bfloat16,
        "float16": np.float16,
        "float32": np.float32,
        "float64": np.float64,
    }[dtype]
    return lambda x: x.astype(kind).astype(np.float64)


def linear(x: Array, weight: Array, bias: Array | None = None, *, round: Round = exact) -> Array:
    """x W^T + b with W [out, in]."""
    y = x @ weight.T
    return round(y if bias is None else y + bias)


def rms_norm(x_BTD: Array, weight_D: Array, eps: float, *, round: Round = exact) -> Array:
    """x / sqrt(mean(x^2) + eps), rounded, then times the weight (arXiv 1910.07467, eq. 4)."""
    mean_square = np.mean(x_BTD**2, axis=-1, keepdims=True)
    return round(round(x_BTD / np.sqrt(mean_square + eps)) * weight_D)


# Which token is where


def token_order(attention_mask_BT: Array, past_length_B: Array) -> Array:
    """The number of real tokens before each token of its row, or -1 for padding.

    Order decides what a token sees: causality and the window count real tokens only, so padding changes nothing.

        mask   0 0 1 1 1        1 1 0 1 0
        order  - - 0 1 2        0 1 - 2 -
    """
    order = past_length_B[:, None] + np.cumsum(attention_mask_BT, axis=1) - 1
    return np.where(attention_mask_BT != 0, order, -1)


def token_positions(attention_mask_BT: Array, past_length_B: Array, document_ids_BT: Array | None = None) -> Array:
    """The position each token is rotated by: its order, not below 0, counted anew in each packed document."""
    position = np.maximum(past_length_B[:, None] + np.cumsum(attention_mask_BT, axis=1) - 1, 0)
    if document_ids_BT is None:
        return position
    starts = np.concatenate([np.ones_like(position[:, :1]), document_ids_BT[:, 1:] != document_ids_BT[:, :-1]], axis=1)
    return position - np.maximum.accumulate(np.where(starts != 0, position, 0), axis=1)


def documents_of(position_BT: Array) -> Array:
    """The packed document of each token where none are told: one begins where positions begin again."""
    again = position_BT[:, 1:] <= position_BT[:, :-1]
    return np.concatenate([np.zeros_like(position_BT[:, :1]), np.cumsum(again, axis=1)], axis=1)


def attention_mask(
    query_order_BT: Array,
    key_order_BS: Array,
    window: int | None,
    *,
    document_ids_BT: Array | None = None,
) -> Array:
    """[B, T, S] bool: which keys each query sees. A window of W is the W tokens t-W+1 ... t, itself included.

        window None    window 3       window 1       window 3, first token is padding
        1 . . . .      1 . . . .      1 . . . .      . . . . .
        1 1 . . .      1 1 . . .      . 1 . . .      . 1 . . .
        1 1 1 . .      1 1 1 . .      . . 1 . .      . 1 1 . .
        1 1 1 1 .      . 1 1 1 .      . . . 1 .      . 1 1 1 .
        1 1 1 1 1      . . 1 1 1      . . . . 1      . . 1 1 1

    Source: mistral-inference's ring buffer of W entries; transformers' `kv > q - W`. Padding neither sees nor is seen.
    Packed documents see themselves only.
    """
    query, key = query_order_BT[:, :, None], key_order_BS[:, None, :]
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible &= query - key < window
    if document_ids_BT is not None:
        visible &= document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return visible


# Rotary embeddings


def rotary_angles(position_BT: Array, config: MistralConfig) -> Array:
    """[B, T, H/2]: inverse frequency times position, both and the product in float32, as published Mistrals run."""
    inverse_frequency = np.array(rotary_table(config).inverse_frequency, np.float32)
    return (position_BT.astype(np.float32)[..., None] * inverse_frequency).astype(np.float64)


def rotary(position_BT: Array, config: MistralConfig) -> tuple[Array, Array]:
    """cos and sin of the angles, [B, T, H/2] each, times yarn's attention factor where there is one."""
    angle = rotary_angles(position_BT, config)
    factor = rotary_table(config).attention_factor
    return np.cos(angle) * factor, np.sin(angle) * factor


def rotate(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array, *, round: Round = exact) -> Array:
    """Turn the pairs (x_i, x_{i+H/2}) by their angles: arXiv 2104.09864 eq. 34, in Hugging Face's half-split layout."""
    first, second = np.split(x_BTNH, 2, axis=-1)
    cos, sin = cos_BTH[:, :, None, :], sin_BTH[:, :, None, :]
    return round(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))


def query_scale(position_BT: Array, config: MistralConfig) -> Array | None:
    """[B, T]: 1 + beta log(1 + floor(position / L)), L being the length before yarn; None where queries have no scale.

    Far from the beginning a query has more keys to tell apart, and its softmax is made sharper. The position is the one
    that rotates. Source: transformers' Ministral 3, after Llama 4's attention temperature.
    """
    scaling = query_scaling(config)
    if scaling is None:
        return None
    return 1 + scaling.beta * np.log(1 + position_BT // scaling.original_length)


def scale_queries(q_BTNH: Array, scale_BT: Array | None, *, round: Round = exact) -> Array:
    """The rotated queries, each times its scale."""
    return q_BTNH if scale_BT is None else round(q_BTNH * scale_BT[:, :, None, None])


# Attention and MLP


def softmax(x: Array, visible: Array) -> Array:
    """exp(x) / sum exp(x) over the visible entries of the last axis; a row that sees nothing is all zeros."""
    top = np.max(np.where(visible, x, -np.inf), axis=-1, keepdims=True, initial=-1e300)
    weights = np.where(visible, np.exp(np.where(visible, x - top, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def attend(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array, *, round: Round = exact
) -> tuple[Array, Array]:
    """softmax(q k / sqrt(H)) v; query head n reads key/value head n // G (GQA, arXiv 2305.13245).

    Returns the output [B, T, N, H] and the weights [B, N, T, S].
    """
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = np.repeat(k_BSKH, groups, axis=2), np.repeat(v_BSKH, groups, axis=2)
    scores = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(q_BTNH.shape[-1])
    weights = round(softmax(scores, visible_BTS[:, None]))
    return round(np.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)), weights


def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), written so that nothing overflows (arXiv 1702.03118)."""
    return x * np.where(x >= 0, 1, np.exp(np.minimum(x, 0))) / (1 + np.exp(-np.abs(x)))


def swiglu(x_BTD: Array, gate_FD: Array, up_FD: Array, down_DF: Array, *, round: Round = exact) -> Array:
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6)."""
    gate = round(silu(linear(x_BTD, gate_FD, round=round)))
    return linear(round(gate * linear(x_BTD, up_FD, round=round)), down_DF, round=round)


# Reading a whole row


def last_token(order_BT: Array) -> Array:
    """[B]: the column of each row's last real token, 0 where a row has none."""
    return np.max(np.where(order_BT >= 0, np.arange(order_BT.shape[1]), 0), axis=1)


# Losses, each a sum and how many numbers are in it: those of parts of a step add up, and are divided once


def cross_entropy(logits: Array, labels: Array, *, ignore: int = -100) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[label] over the labels that are not `ignore`; logits [..., V], labels [...]."""
    return -_log_probabilities(logits, labels, ignore).sum(), (labels != ignore).sum()


def _log_probabilities(logits: Array, labels: Array, ignore: int) -> Array:
    """log softmax(logits)[label] of each label, 0 of those that are ignored."""
    top = logits.max(axis=-1, keepdims=True)
    log_probability = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    counted = labels != ignore
    picked = np.take_along_axis(log_probability, np.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return np.where(counted, picked, 0)


def binary_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Sum of -[y log s(x) + (1 - y) log(1 - s(x))], s the logistic function, in its stable form."""
    losses = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    return losses.sum(), np.array(losses.size)


def squared_error(predictions: Array, labels: Array) -> tuple[Array, Array]:
    """Sum of (x - y)^2."""
    return ((predictions - labels) ** 2).sum(), np.array(predictions.size)


def label_log_probability(logits: Array, labels: Array, *, ignore: int = -100) -> Array:
    """Sums [B] of log softmax(logits)[label] over labels [B, T] of each row, each predicted by the column before."""
    return _log_probabilities(logits[:, :-1], labels[:, 1:], ignore).sum(-1)


def preference_loss(
    policy_B: Array, reference_B: Array, counted_B: Array, *, beta: float
) -> tuple[Array, Array, Array]:
    """Sum of -log sigmoid(beta * margin) over pairs, their number, and of how many the margin is above 0.

    The first half of the rows are chosen answers, the second half rejected ones; margin = (policy - reference) of a
    chosen answer less that of the rejected one (DPO, arXiv 2305.18290, equation 7). A pair of rows that are not counted
    is none.
    """
    change = policy_B - reference_B
    chosen, rejected = np.split(change, 2)
    margin, pairs = beta * (chosen - rejected), np.split(counted_B, 2)[0]
    losses = np.logaddexp(0, -margin)
    return np.where(pairs, losses, 0).sum(), pairs.sum(), (pairs & (margin > 0)).sum()


def divided(total: Array, count: Array, num_items_in_batch: Any = None) -> Array:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = np.asarray(count if num_items_in_batch is None else num_items_in_batch)
    return (total / np.where(count > 0, count, 1)).mean()
