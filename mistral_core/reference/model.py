"""MistralModel: embed, L blocks of attention and MLP around a residual stream, norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..generation.cache_layout import grown_slots
from ..outputs import ModelOutput
from . import ops
from .cache import KVCache, slot_order
from .ops import Round, exact

Parameters = Mapping[str, Array]


class Step(NamedTuple):
    """What the layers of one call share."""

    cos_sin: tuple[Array, Array]
    """cos and sin [B, T, H/2] of the new tokens."""
    order_BT: Array
    """[B, T]: the number of real tokens before each new one in its row, -1 for padding."""
    query_scale_BT: Array | None = None
    """[B, T]: what the rotated queries are multiplied by; None: by nothing."""
    document_ids_BT: Array | None = None
    """[B, T]: the packed document of each token."""


def forward(
    config: MistralConfig,
    parameters: Parameters,
    input_ids: Array | None = None,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: Array | None = None,
    *,
    document_ids: Array | None = None,
    use_cache: bool = False,
    round: Round = exact,
) -> ModelOutput:
    """Hidden states [B, T, D] of ids [B, T]; every layer's states and weights; the cache that follows if asked for."""
    parameters = _Exact(parameters)
    x_BTD = parameters["model.embed_tokens.weight"][np.asarray(input_ids)] if inputs_embeds is None else inputs_embeds
    past = past_key_values
    if past is None and use_cache:
        past = KVCache.allocate(config, len(x_BTD))
    step = step_of(config, x_BTD.shape[:2], attention_mask, position_ids, past, document_ids=document_ids)

    hidden_states, attentions, kept = [x_BTD], [], []
    for layer in range(config.num_hidden_layers):
        x_BTD, weights, keys_values = decoder_layer(config, parameters, layer, x_BTD, step, past, round=round)
        hidden_states.append(x_BTD)
        attentions.append(weights)
        kept.append(keys_values)
    hidden_states[-1] = ops.rms_norm(x_BTD, parameters["model.norm.weight"], config.rms_norm_eps, round=round)

    cache = None
    if past is not None:
        keys, values = zip(*kept, strict=True)
        cache = past._replace(keys=keys, values=values, length=past.length + (step.order_BT >= 0).sum(axis=1))
    return ModelOutput(hidden_states[-1], cache, tuple(hidden_states), tuple(attentions))


def step_of(
    config: MistralConfig,
    shape: tuple[int, ...],
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    past: KVCache | None = None,
    *,
    document_ids: Array | None = None,
) -> Step:
    """What the layers share in a call of tokens of a shape [B, T]; positions that begin again are documents."""
    mask_BT = np.ones(shape, int) if attention_mask is None else np.asarray(attention_mask, int)
    length_B = np.zeros(shape[0], int) if past is None else past.length
    order_BT = ops.token_order(mask_BT, length_B)
    if document_ids is None and position_ids is not None and attention_mask is None and past is None:
        document_ids = ops.documents_of(np.broadcast_to(position_ids, mask_BT.shape))
    if position_ids is None:
        position_ids = ops.token_positions(mask_BT, length_B, document_ids)
    position_BT = np.asarray(position_ids)
    return Step(ops.rotary(position_BT, config), order_BT, ops.query_scale(position_BT, config), document_ids)


def decoder_layer(
    config: MistralConfig,
    parameters: Parameters,
    layer: int,
    x_BTD: Array,
    step: Step,
    past: KVCache | None = None,
    *,
    round: Round = exact,
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """One block: x + attention(norm(x)), then x + mlp(norm(x)); also the weights and the layer's cache."""

    def weight(name: str) -> Array:
        return parameters[f"model.layers.{layer}.{name}.weight"]

    h = ops.rms_norm(x_BTD, weight("input_layernorm"), config.rms_norm_eps, round=round)
    h, weights, kept = attention(config, parameters, layer, h, step, past, round=round)
    x_BTD = round(x_BTD + h)
    h = ops.rms_norm(x_BTD, weight("post_attention_layernorm"), config.rms_norm_eps, round=round)
    h = ops.swiglu(h, weight("mlp.gate_proj"), weight("mlp.up_proj"), weight("mlp.down_proj"), round=round)
    return round(x_BTD + h), weights, kept


def attention(
    config: MistralConfig,
    parameters: Parameters,
    layer: int,
    x_BTD: Array,
    step: Step,
    past: KVCache | None = None,
    *,
    round: Round = exact,
) -> tuple[Array, Array, tuple[Array, Array] | None]:
    """Project, rotate, remember, attend over the past and the new tokens, project back."""
    B, T, _ = x_BTD.shape
    window = config.layer_windows[layer]
    q_BTNH, k_BTKH, v_BTKH = queries_keys_values(config, parameters, layer, x_BTD, step, round=round)

    order_BT, document_ids_BT = step.order_BT, step.document_ids_BT
    k_BSKH, v_BSKH, key_order_BS, kept = k_BTKH, v_BTKH, order_BT, None
    if past is not None:
        k_BTKH, v_BTKH = round(past.kept(k_BTKH)), round(past.kept(v_BTKH))
        past_keys, past_values = past.keys[layer], past.values[layer]
        slots = grown_slots(past_keys.shape[1], T, window, past.capacity)
        kept = past.update(layer, k_BTKH, v_BTKH, order_BT, slots)
        k_BSKH = np.concatenate([past_keys, k_BTKH], axis=1)
        v_BSKH = np.concatenate([past_values, v_BTKH], axis=1)
        key_order_BS = np.concatenate([slot_order(past.length, past_keys.shape[1]), order_BT], axis=1)

    visible_BTS = ops.attention_mask(order_BT, key_order_BS, window, document_ids_BT=document_ids_BT)
    o_BTNH, weights = ops.attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS, round=round)
    output = parameters[f"model.layers.{layer}.self_attn.o_proj.weight"]
    return ops.linear(o_BTNH.reshape(B, T, -1), output, round=round), weights, kept


def queries_keys_values(
    config: MistralConfig, parameters: Parameters, layer: int, x_BTD: Array, step: Step, *, round: Round = exact
) -> tuple[Array, Array, Array]:
    """q [B, T, N, H], rotated and scaled, k [B, T, K, H], rotated, and v [B, T, K, H] of the new tokens."""

    def project(name: str, heads: int) -> Array:
        y = ops.linear(x_BTD, parameters[f"model.layers.{layer}.self_attn.{name}.weight"], round=round)
        return y.reshape(*x_BTD.shape[:2], heads, config.head_dim)

    q_BTNH = ops.rotate(project("q_proj", config.num_attention_heads), *step.cos_sin, round=round)
    k_BTKH = ops.rotate(project("k_proj", config.num_key_value_heads), *step.cos_sin, round=round)
    v_BTKH = project("v_proj", config.num_key_value_heads)
    return ops.scale_queries(q_BTNH, step.query_scale_BT, round=round), k_BTKH, v_BTKH


class _Exact(dict[str, Array]):
    """The parameters in float64, each converted when it is first asked for."""

    def __init__(self, source: Parameters) -> None:
        super().__init__()
        self._source: Parameters = source._source if isinstance(source, _Exact) else source

    def __missing__(self, name: str) -> Array:
        self[name] = np.asarray(self._source[name]).astype(np.float64)
        return self[name]
