"""A decoder layer in pieces, in the dtype of its inputs: what calibration and reports compute.

The formulas are those of `reference`, whose attention is in float64; here the scores of a few queries at once are kept,
with the keys that these may see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..errors import EmptyInputError, InputError, TokenIdError
from ..parameters import BODY
from ..reference import ops
from ..reference.model import Step
from . import rounding
from .matrix import PackedMatrix, dequantised

QUERIES = 256
"""Positions whose scores are computed at once."""

EMBEDDING = BODY[0].name
TOKENS = 4096
"""Tokens that go through a layer at once, if a text is no longer."""

Weights = Callable[[str], Array]
"""The part of a name between the layer's number and `.weight` -> the array."""


def checked_ids(config: MistralConfig, ids: Array) -> Array:
    """Token ids [N, T] as an array; raises InputError, EmptyInputError, TokenIdError."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError(f"ids must be integers [N, T], got {ids.dtype} {list(ids.shape)}.")
    if not ids.size:
        raise EmptyInputError(f"ids must hold a token, got {list(ids.shape)}.")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise TokenIdError(f"ids must be in [0, {config.vocab_size}), got {ids.min()} to {ids.max()}.")
    return ids


def batches_of(count: int, length: int) -> list[slice]:
    """So many texts of a length in parts of about `TOKENS`."""
    several = max(1, TOKENS // length)
    return [slice(start, min(start + several, count)) for start in range(0, count, several)]


def floats(source: Mapping[str, Array | PackedMatrix], name: str) -> Array:
    """A parameter in float32; raises NonFiniteWeightsError."""
    stored = source[name]
    result = dequantised(stored) if isinstance(stored, PackedMatrix) else np.asarray(stored).astype(np.float32)
    rounding.check_finite(name, result)
    return result


def embedded(source: Mapping[str, Array | PackedMatrix], ids: Array) -> Array:
    """The embeddings [N, T, D] of ids in float32, without all others in float32; raises NonFiniteWeightsError."""
    stored = source[EMBEDDING]
    result = (dequantised(stored) if isinstance(stored, PackedMatrix) else np.asarray(stored))[ids].astype(np.float32)
    rounding.check_finite(EMBEDDING, result)
    return result


def step_of(config: MistralConfig, length: int, dtype: type[np.floating[Any]] = np.float32) -> Step:
    """What all layers share, for texts of `length` tokens without padding: [1, T] for any number of them."""
    order_BT = np.arange(length)[None]
    cos, sin = ops.rotary(order_BT, config)
    scale = ops.query_scale(order_BT, config)
    return Step((cos.astype(dtype), sin.astype(dtype)), order_BT, None if scale is None else scale.astype(dtype))


def weights_of(parameters: Mapping[str, Array], layer: int) -> Weights:
    """The weights of a layer by the short parts of their names."""
    return lambda name: parameters[f"model.layers.{layer}.{name}.weight"]


def decoder_layer(config: MistralConfig, weight: Weights, layer: int, x_BTD: Array, step: Step) -> Array:
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""
    h = ops.rms_norm(x_BTD, weight("input_layernorm"), config.rms_norm_eps)
    h = ops.linear(mixed(config, weight, layer, h, step), weight("self_attn.o_proj"))
    x_BTD = x_BTD + h
    h = ops.rms_norm(x_BTD, weight("post_attention_layernorm"), config.rms_norm_eps)
    return x_BTD + ops.swiglu(h, weight("mlp.gate_proj"), weight("mlp.up_proj"), weight("mlp.down_proj"))


def mixed(config: MistralConfig, weight: Weights, layer: int, x_BTD: Array, step: Step) -> Array:
    """What the output projection of attention multiplies, [B, T, NH], of normed states."""
    B, T, _ = x_BTD.shape
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_BTNH = ops.rotate(ops.linear(x_BTD, weight("self_attn.q_proj")).reshape(B, T, N, H), *step.cos_sin)
    k_BTKH = ops.rotate(ops.linear(x_BTD, weight("self_attn.k_proj")).reshape(B, T, K, H), *step.cos_sin)
    v_BTKH = ops.linear(x_BTD, weight("self_attn.v_proj")).reshape(B, T, K, H)
    q_BTNH = ops.scale_queries(q_BTNH, step.query_scale_BT) / x_BTD.dtype.type(np.sqrt(H))
    window = config.layer_windows[layer]
    parts = []
    for start in range(0, T, QUERIES):
        queries = slice(start, start + QUERIES)
        keys = slice(0 if window is None else max(0, start - window + 1), min(start + QUERIES, T))
        visible_BTS = ops.attention_mask(step.order_BT[:, queries], step.order_BT[:, keys], window)
        parts.append(_attended(q_BTNH[:, queries], k_BTKH[:, keys], v_BTKH[:, keys], visible_BTS))
    return np.concatenate(parts, axis=1)


def _attended(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BTS: Array) -> Array:
    """softmax(q k) v [B, T, NH]; the queries of one key head are rows of one product."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    scores = (q @ k_BSKH.transpose(0, 2, 3, 1)).reshape(B, N, T, S)
    scores -= np.max(scores, axis=-1, keepdims=True, where=visible_BTS[:, None], initial=-np.inf)
    np.exp(scores, out=scores, where=visible_BTS[:, None])
    scores *= visible_BTS[:, None]
    scores /= scores.sum(axis=-1, keepdims=True)
    o = scores.reshape(B, K, -1, S) @ v_BSKH.transpose(0, 2, 1, 3)
    return o.reshape(B, N, T, H).transpose(0, 2, 1, 3).reshape(B, T, N * H)
