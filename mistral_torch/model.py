"""MistralModel: embed, L decoder layers, norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistral_core import MistralConfig
from mistral_core.compat.clients import documents_told

from .arrays import Inputs, model_inputs
from .attention import check_implementation
from .attention_in_c import may_be_for_c
from .cache import KVCache
from .checkpointing import checkpointed
from .compat import attention_name
from .foreign_cache import takes_foreign_caches
from .layers import DecoderLayer, RMSNorm, query_scale, rotary, token_order, token_positions
from .outputs import ModelOutput
from .step import Step, steps_of_layers
from .weights import PreTrainedModel
from .whole_call import in_one_call

OfLayers = tuple[list[Tensor], list[Tensor | None], list[Any]]
"""Hidden states before, between and after the layers, attention weights, and the keys and values that are kept."""


class MistralModel(PreTrainedModel):
    """The body shared by every head: token ids to hidden states."""

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.of(config)
        super().__init__(config)
        self.config = config.noted(attn_implementation=attention_name(attn_implementation))
        self.implementation = check_implementation(attn_implementation)
        # of given memory: torch would draw numbers of its own first, for which it loads its compiler on a meta device
        embeddings_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings_VD, freeze=False)
        self.layers = nn.ModuleList(
            DecoderLayer(config, window, attn_implementation) for window in config.layer_windows
        )
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
    ) -> ModelOutput:
        """Hidden states [B, T, D] of ids [B, T] or embeddings [B, T, D]; None options mean the config's.

        `attention_mask` [B, T] is 1 for real tokens; with a cache it may cover the past too. `position_ids` feed the
        rotary embeddings; without a mask, where they begin again a packed document begins. `document_ids` tell packed
        documents apart; `others` may hold what transformers' collators say instead, and its arguments without effect
        here. Raises InputError and its kinds.
        """
        inputs = model_inputs(
            self.config_here, self.device, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            documents_told(others, document_ids),
        )  # fmt: skip
        x_BTD, steps, past = self._start(inputs, past_key_values, use_cache, output_attentions)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        of_layers = self._run(x_BTD, steps, past, with_states)
        output = self._output(of_layers, steps[0], past, with_states)
        return self.as_tuple_if_asked(output, return_dict)

    if TYPE_CHECKING:  # an editor sees what a call returns
        __call__ = forward

    def _start(
        self, inputs: Inputs, past: KVCache | None, use_cache: bool | None, output_attentions: bool | None
    ) -> tuple[Tensor, list[Step], KVCache | None]:
        """The embeddings [B, T, D], what each layer is told, and the cache they read: a new one where none is given."""
        config, mask_BT = self.config, inputs.attention_mask
        x_BTD = self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        if use_cache is None:
            use_cache = config.use_cache and not self.training and inputs.document_ids is None
        if past is None and use_cache:
            past = KVCache.allocate(self.config_here, x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        length_B = torch.zeros_like(mask_BT[:, 0]) if past is None else past.length
        position_BT = inputs.position_ids
        if position_BT is None:
            position_BT = token_positions(mask_BT, length_B, inputs.document_ids)
        step = Step(
            cos_sin=rotary(position_BT, config),
            order_BT=token_order(mask_BT, length_B),
            capacity=None if past is None else past.capacity,
            query_scale_BT=query_scale(position_BT, config),
            document_ids_BT=inputs.document_ids,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            in_c=not (self.training and config.attention_dropout) and may_be_for_c(x_BTD, config.head_dim),
        )
        return x_BTD, steps_of_layers(step, config.layer_windows, past, self.implementation), past

    @in_one_call
    def _run(self, x_BTD: Tensor, steps: list[Step], past: KVCache | None, with_states: bool) -> OfLayers:
        """The layers in turn; of hidden states the last alone, unless all are wanted."""
        hidden_states, attentions, kept = [x_BTD], [], []
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing is not None and self.training and torch.is_grad_enabled():
                layer = checkpointed(layer, self.gradient_checkpointing)
            of_past = None if past is None else past.layer(index)
            x_BTD, weights, keys_values = layer(x_BTD, steps[index], of_past)
            hidden_states = [*hidden_states, x_BTD] if with_states else [x_BTD]
            attentions.append(weights)
            kept.append(keys_values)
        return hidden_states, attentions, kept

    def _output(self, of_layers: OfLayers, step: Step, past: KVCache | None, with_states: bool) -> ModelOutput:
        """What is returned: the last hidden states normed, the cache after the call, and what else is asked for."""
        hidden_states, attentions, kept = of_layers
        hidden_states[-1] = self.norm(hidden_states[-1])
        return ModelOutput(
            hidden_states[-1],
            None if past is None else past.advanced(kept, step.order_BT),
            tuple(hidden_states) if with_states else None,
            tuple(attentions) if step.output_attentions else None,
        )
