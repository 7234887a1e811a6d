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

from .arrays import Inputs, as_dtypes, model_inputs
from .attention import check_implementation
from .cache import KVCache
from .checkpointing import checkpointed
from .layers import DecoderLayer, Embedding, RMSNorm, query_scale, rotary, token_order, token_positions
from .step import Step, steps_of_layers
from .weights import PreTrainedModel, functional

OfLayers = tuple[list[Array], list[Array | None], list[Any]]
"""Hidden states before, between and after the layers, attention weights, and the keys and values that are kept."""


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
        config = MistralConfig.of(config)
        super().__init__(config)
        self.config = config
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.implementation = check_implementation(attn_implementation)
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
    ) -> ModelOutput:
        """Hidden states [B, T, D] of ids [B, T] or embeddings [B, T, D]; None options mean the config's.

        `attention_mask` [B, T] is 1 for real tokens; with a cache it may cover the past too. `position_ids` feed the
        rotary embeddings; without a mask, where they begin again a packed document begins. `document_ids` tell packed
        documents apart; `others` may hold what transformers' collators say instead, and its arguments without effect
        here. Raises InputError and its kinds.
        With `params`, those are used instead of the model's own; with `rngs` (a key or nnx.Rngs), dropout is on.
        """
        inputs = model_inputs(
            self.config, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            documents_told(others, document_ids),
        )  # fmt: skip
        trains = rngs is not None or self.gradient_checkpointing is not None
        x_BTD, steps, past = self._start(inputs, past_key_values, use_cache, output_attentions, trains)
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        of_layers = self.run_layers(
            self.layers, x_BTD, steps, past, rngs=dropout_keys(rngs, self.config.num_hidden_layers),
            checkpointing=self.gradient_checkpointing, output_hidden_states=with_states,
        )  # fmt: skip
        output = self._output(of_layers, steps[0], past, with_states)
        return self.as_tuple_if_asked(output, return_dict)

    def _start(
        self, inputs: Inputs, past: KVCache | None, use_cache: bool | None, output_attentions: bool | None, trains: bool
    ) -> tuple[Array, list[Step], KVCache | None]:
        """The embeddings [B, T, D], what each layer is told, and the cache they read: a new one where none is given."""
        config, mask_BT = self.config, inputs.attention_mask
        if inputs.inputs_embeds is None:
            x_BTD = self.embed_tokens(inputs.input_ids)
        else:
            x_BTD = inputs.inputs_embeds.astype(self.dtype)
        if use_cache is None:
            use_cache = config.use_cache and not trains and inputs.document_ids is None
        if past is None and use_cache:
            past = KVCache.allocate(config, x_BTD.shape[0], dtype=x_BTD.dtype)
        length_B = jnp.zeros_like(mask_BT[:, 0]) if past is None else past.length
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
        )
        return x_BTD, steps_of_layers(step, config.layer_windows, past, self.implementation), past

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


def one_by_one(
    layers: nnx.Dict,
    x_BTD: Array,
    steps: list[Step],
    past: KVCache | None,
    *,
    rngs: Any,
    checkpointing: Iterable[tuple[str, Any]] | None,
    output_hidden_states: bool,
) -> OfLayers:
    """The layers in turn."""
    hidden_states, attentions, kept = [x_BTD], [], []
    for index in range(len(layers)):  # by number: JAX sorts a dict's keys as text, 10 before 2
        layer = layers[str(index)]
        if checkpointing is not None:
            layer = checkpointed(layer, dict(checkpointing))
        of_past = None if past is None else past.layer(index)
        x_BTD, weights, keys_values = layer(x_BTD, steps[index], of_past, rngs=rngs[index])
        hidden_states.append(x_BTD)
        attentions.append(weights)
        kept.append(keys_values)
    return hidden_states, attentions, kept


def dropout_keys(rngs: Any, count: int) -> Any:
    """`count` keys from a key or nnx.Rngs; Nones from None."""
    if rngs is None:
        return [None] * count
    return jax.random.split(rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs, count)
