"""MistralModel: embed, L decoder layers, norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mistral_core import MistralConfig
from mistral_core.compat.clients import documents_told
from mistral_core.outputs import ModelOutput

from .arrays import as_dtypes, model_inputs
from .cache import KVCache
from .checkpointing import checkpointed
from .layers import DecoderLayer, Embedding, RMSNorm, rotary, token_order, token_positions
from .weights import PreTrainedModel, functional


class MistralModel(PreTrainedModel):
    """The body shared by every head: token ids to hidden states."""

    def __init__(
        self,
        config: MistralConfig,
        *,
        attn_implementation: str | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        config = MistralConfig.taken(config)
        super().__init__(config)
        self.config = config
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, std=config.initializer_range, **options
        )
        # a dict, not a list: its string keys are the layer numbers of the parameters' names
        self.layers = nnx.Dict(
            {
                str(index): DecoderLayer(config, window, attn_implementation, **options)
                for index, window in enumerate(config.layer_windows)
            }
        )
        self.run_layers = one_by_one
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.gradient_checkpointing: tuple[tuple[str, Any], ...] | None = None

    @functional
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Any = None,
        *,
        document_ids: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        rngs: Any = None,
        **others: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Hidden states [B, T, D] of ids [B, T] or embeddings [B, T, D]; None options mean the config's.

        `attention_mask` [B, T] is 1 for real tokens; with a cache it may cover the past too. `position_ids` feed the
        rotary embeddings; without a mask, where they begin again a packed document begins. `document_ids` tell packed
        documents apart; `others` may hold what transformers' collators say instead, and its arguments without effect
        here. Raises InputError and its kinds.
        With `params`, those are used instead of the model's own; with `rngs` (a key or nnx.Rngs), dropout is on.
        """
        config = self.config
        document_ids = documents_told(others, document_ids)
        inputs = model_inputs(
            config,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            document_ids,
        )
        if inputs.inputs_embeds is None:
            x_BTD = self.embed_tokens(inputs.input_ids)
        else:
            x_BTD = inputs.inputs_embeds.astype(self.dtype)
        past = past_key_values
        if use_cache is None:
            trains = rngs is not None or self.gradient_checkpointing is not None
            use_cache = config.use_cache and not trains and inputs.document_ids is None
        if past is None and use_cache:
            past = KVCache.allocate(config, x_BTD.shape[0], dtype=x_BTD.dtype)
        length_B = jnp.zeros_like(inputs.attention_mask[:, 0]) if past is None else past.length
        order_BT = token_order(inputs.attention_mask, length_B)
        position_BT = inputs.position_ids
        if position_BT is None:
            position_BT = token_positions(inputs.attention_mask, length_B, inputs.document_ids)
        cos_sin = rotary(position_BT, config)
        with_attentions = config.output_attentions if output_attentions is None else output_attentions
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        hidden_states, attentions, kept = self.run_layers(
            self.layers,
            x_BTD,
            cos_sin,
            order_BT,
            past=past,
            rngs=dropout_keys(rngs, config.num_hidden_layers),
            checkpointing=self.gradient_checkpointing,
            output_hidden_states=with_states,
            output_attentions=with_attentions,
            document_ids=inputs.document_ids,
        )
        hidden_states[-1] = self.norm(hidden_states[-1])

        cache = None
        if past is not None:
            keys, values = zip(*kept, strict=True)
            cache = KVCache(keys, values, length_B + inputs.attention_mask.sum(1), past.capacity)
        output = ModelOutput(
            hidden_states[-1],
            cache,
            tuple(hidden_states) if with_states else None,
            tuple(attentions) if with_attentions else None,
        )
        return self.returned(output, return_dict)


def one_by_one(
    layers: nnx.Dict,
    x_BTD: Array,
    cos_sin: tuple[Array, Array],
    order_BT: Array,
    *,
    past: KVCache | None,
    rngs: Any,
    checkpointing: Iterable[tuple[str, Any]] | None,
    output_hidden_states: bool,
    **options: Any,
) -> tuple[list[Array], list[Array | None], list[Any]]:
    """The layers in turn: hidden states (the last is the result), attention weights, and keys and values kept."""
    hidden_states, attentions, kept = [x_BTD], [], []
    for index in range(len(layers)):  # by number: JAX sorts a dict's keys as text, 10 before 2
        layer = layers[str(index)]
        if checkpointing is not None:
            layer = checkpointed(layer, dict(checkpointing))
        x_BTD, weights, keys_values = layer(
            x_BTD,
            cos_sin,
            order_BT,
            past=None if past is None else past.layer(index),
            capacity=None if past is None else past.capacity,
            rngs=rngs[index],
            **options,
        )
        hidden_states.append(x_BTD)
        attentions.append(weights)
        kept.append(keys_values)
    return hidden_states, attentions, kept


def dropout_keys(rngs: Any, count: int) -> Any:
    """`count` keys from a key or nnx.Rngs; Nones from None."""
    if rngs is None:
        return [None] * count
    return jax.random.split(rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs, count)
