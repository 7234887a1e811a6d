"""MistralModel: embed, L decoder layers, norm."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mistral_core import MistralConfig
from mistral_core.compat.clients import documents_told
from mistral_core.outputs import ModelOutput

from .arrays import as_policy, model_inputs
from .cache import KVCache
from .checkpointing import checkpointed
from .layers import DecoderLayer, Embedding, RMSNorm, rotary, token_order, token_positions
from .weights import PreTrainedModel, default_initializer


class MistralModel(PreTrainedModel):
    """The body shared by every head: token ids to hidden states."""

    def __init__(
        self,
        config: MistralConfig,
        *,
        attn_implementation: str | None = None,
        dtype: Any = None,
        initializer: Any = None,
        name: str | None = None,
    ) -> None:
        config = MistralConfig.taken(config)
        dtype, initializer = as_policy(dtype), initializer or default_initializer(config)
        super().__init__(config, dtype=dtype, name=name)
        self.config = config
        options = {"dtype": dtype, "initializer": initializer}
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, name=f"{self.name}.embed_tokens", **options
        )
        # `layers` is Keras' own name for a model's direct parts
        self.decoder_layers = [
            DecoderLayer(config, window, attn_implementation, name=f"{self.name}.layers.{index}", **options)
            for index, window in enumerate(config.layer_windows)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, name=f"{self.name}.norm")
        self.gradient_checkpointing: dict[str, Any] | None = None

    def call(
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
        training: bool = False,
        **others: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Hidden states [B, T, D] of ids [B, T] or embeddings [B, T, D]; None options mean the config's.

        `attention_mask` [B, T] is 1 for real tokens; with a cache it may cover the past too. `position_ids` feed the
        rotary embeddings; without a mask, where they begin again a packed document begins. `document_ids` tell packed
        documents apart; `others` may hold what transformers' collators say instead, and its arguments without effect
        here. Raises InputError and its kinds.
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
            x_BTD = tf.cast(inputs.inputs_embeds, self.compute_dtype)
        past = past_key_values
        if use_cache is None:  # a ring's size is static: a text of unknown length has no room in it
            use_cache = config.use_cache and not training and inputs.document_ids is None and x_BTD.shape[1] is not None
        if past is None and use_cache:
            past = KVCache.allocate(config, tf.shape(x_BTD)[0], dtype=x_BTD.dtype)
        length_B = tf.zeros_like(inputs.attention_mask[:, 0]) if past is None else past.length
        order_BT = token_order(inputs.attention_mask, length_B)
        position_BT = inputs.position_ids
        if position_BT is None:
            position_BT = token_positions(inputs.attention_mask, length_B, inputs.document_ids)
        cos_sin = rotary(position_BT, config)
        with_attentions = config.output_attentions if output_attentions is None else output_attentions

        hidden_states, attentions, kept = [x_BTD], [], []
        seeds = dropout_seeds(config, training)
        for index, layer in enumerate(self.decoder_layers):
            if self.gradient_checkpointing is not None and training:
                layer = checkpointed(layer, self.gradient_checkpointing)
            x_BTD, weights, keys_values = layer(
                x_BTD,
                cos_sin,
                order_BT,
                past=None if past is None else past.layer(index),
                capacity=None if past is None else past.capacity,
                document_ids=inputs.document_ids,
                output_attentions=with_attentions,
                seed=seeds[index],
            )
            hidden_states.append(x_BTD)
            attentions.append(weights)
            kept.append(keys_values)
        hidden_states[-1] = self.norm(x_BTD)

        cache = None
        if past is not None:
            keys, values = zip(*kept, strict=True)
            length = length_B + tf.reduce_sum(inputs.attention_mask, 1)
            cache = KVCache(keys, values, length, past.capacity)
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ModelOutput(
            hidden_states[-1],
            cache,
            tuple(hidden_states) if with_states else None,
            tuple(attentions) if with_attentions else None,
        )
        return self.returned(output, return_dict)


def dropout_seeds(config: MistralConfig, training: bool) -> list[Any]:
    """A seed [2] for each layer from TensorFlow's generator; Nones where nothing is dropped.

    Drawn outside of the layers: one that is computed again for its gradients must drop the same weights.
    """
    if not training or not config.attention_dropout:
        return [None] * config.num_hidden_layers
    return tf.unstack(tf.random.uniform([config.num_hidden_layers, 2], maxval=2**31 - 1, dtype=tf.int32))
