"""MistralModel: embed, L decoder layers, norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mistral_core import MistralConfig
from mistral_core.compat.clients import documents_told

from .arrays import model_inputs
from .cache import KVCache
from .checkpointing import checkpointed
from .compat import attention_name
from .foreign_cache import takes_foreign_caches
from .layers import DecoderLayer, RMSNorm, rotary, token_order, token_positions
from .outputs import ModelOutput
from .weights import PreTrainedModel


class MistralModel(PreTrainedModel):
    """The body shared by every head: token ids to hidden states."""

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.taken(config)
        super().__init__(config)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, window, attn_implementation) for window in config.layer_windows
        )
        self.config.note(attn_implementation=attention_name(attn_implementation))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing: dict[str, Any] | None = None
        self.initialise()

    @takes_foreign_caches
    def forward(
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
            self.device,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            document_ids,
        )
        x_BTD = self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        past = past_key_values
        if use_cache is None:
            use_cache = config.use_cache and not self.training and inputs.document_ids is None
        if past is None and use_cache:
            past = KVCache.allocate(config, x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        length_B = torch.zeros_like(inputs.attention_mask[:, 0]) if past is None else past.length
        order_BT = token_order(inputs.attention_mask, length_B)
        position_BT = inputs.position_ids
        if position_BT is None:
            position_BT = token_positions(inputs.attention_mask, length_B, inputs.document_ids)
        cos_sin = rotary(position_BT, config)
        with_attentions = config.output_attentions if output_attentions is None else output_attentions

        hidden_states, attentions, kept = [x_BTD], [], []
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing is not None and self.training and torch.is_grad_enabled():
                layer = checkpointed(layer, self.gradient_checkpointing)
            x_BTD, weights, keys_values = layer(
                x_BTD,
                cos_sin,
                order_BT,
                past=None if past is None else past.layer(index),
                capacity=None if past is None else past.capacity,
                document_ids=inputs.document_ids,
                output_attentions=with_attentions,
            )
            hidden_states.append(x_BTD)
            attentions.append(weights)
            kept.append(keys_values)
        hidden_states[-1] = self.norm(x_BTD)

        cache = None
        if past is not None:
            keys, values = zip(*kept, strict=True)
            cache = KVCache(keys, values, length_B + inputs.attention_mask.sum(1), past.capacity)
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ModelOutput(
            hidden_states[-1],
            cache,
            tuple(hidden_states) if with_states else None,
            tuple(attentions) if with_attentions else None,
        )
        return self.returned(output, return_dict)
