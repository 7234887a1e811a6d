"""The four heads: a MistralModel and a projection; logits are float32 in every precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mistral_core import MistralConfig, validate
from mistral_core.classes import runs_its_own
from mistral_core.generation.mixin import Generates
from mistral_core.loss_chunks import chunk_rows
from mistral_core.outputs import (
    CausalLMOutput,
    QuestionAnsweringOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .arrays import as_dtypes, integers, is_traced, labels_array, to_numpy
from .generate import Engine
from .layers import Head, last_token
from .losses import chunked_cross_entropy, classification_loss, cross_entropy, divided, span_loss
from .model import MistralModel, dropout_keys
from .products import PackedWeight
from .weights import PreTrainedModel, functional


class MistralForCausalLM(PreTrainedModel, Generates[Array]):
    """Predicts the next token."""

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
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.model = MistralModel(config, attn_implementation=attn_implementation, dtype=dtype, **options)
        tied = config.tie_word_embeddings
        std = config.initializer_range
        self.lm_head = None if tied else Head(config.hidden_size, config.vocab_size, std=std, **options)

    @functional
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        *,
        logits_to_keep: Any = 0,
        num_items_in_batch: Any = None,
        loss_chunk: int | None = None,
        document_ids: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V]; with labels [B, T], the loss of predicting each next label that is not -100.

        `logits_to_keep` is how many last columns to compute (0: all) or their indices. `num_items_in_batch` is how many
        labels the whole step has, of which this call is a part: the parts' losses then add up. `loss_chunk` is of how
        many tokens the loss holds the logits at a time (0: of all), by default chosen under a transformation such as
        `jax.jit` or `jax.grad`: logits of 256 MiB and more are never whole, unless the output's are used, for a program
        leaves out what is not. Options are those of MistralModel.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, return_dict=True,
        )  # fmt: skip
        x_BTD = out.last_hidden_state
        loss = None
        labels = integers("labels", labels)
        logits_to_keep = validate.count_or_indices(logits_to_keep)
        if not is_traced(x_BTD, labels):
            validate.check_logits_to_keep(logits_to_keep, x_BTD.shape[1])
            if labels is not None:
                validate.check_labels("labels", to_numpy(labels), x_BTD.shape[:2], self.config.vocab_size)
        rows = 0
        if labels is not None:
            rows = chunk_rows(loss_chunk, labels.size, self.config.vocab_size, training=is_traced(x_BTD))
        factor = _factor(self.model.embed_tokens if self.lm_head is None else self.lm_head) if rows else None
        head = self.model.embed_tokens.as_linear if self.lm_head is None else self.lm_head
        if factor is not None:
            following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
            loss = divided(*chunked_cross_entropy(x_BTD, factor, following, rows=rows), num_items_in_batch)
            logits = head(_kept(x_BTD, logits_to_keep))
        else:
            logits = head(_kept(x_BTD, 0 if labels is not None else logits_to_keep))
            if labels is not None:
                loss = divided(*cross_entropy(logits[:, :-1], labels[:, 1:]), num_items_in_batch)
                logits = _kept(logits, logits_to_keep)
        output = CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    def _engine(self, compile: str) -> Engine:
        return Engine(self, compile)

    def _as_numpy(self, x: Any) -> Any:
        return to_numpy(x) if isinstance(x, Array) else x

    def _as_array(self, x: Any) -> Array:
        return jnp.asarray(x)


def _kept(x: Array, logits_to_keep: Any) -> Array:
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, jnp.asarray(logits_to_keep)]


def _factor(head: nnx.Module) -> Array | PackedWeight | None:
    """The matrix of a head that is this matrix and nothing else: not wrapped or cut."""
    return head.factor if hasattr(type(head), "factor") and runs_its_own(head, "__call__") else None


class MistralForSequenceClassification(PreTrainedModel):
    """One set of scores for each row, read at its last real token."""

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
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.model = MistralModel(config, attn_implementation=attn_implementation, dtype=dtype, **options)
        self.score = Head(config.hidden_size, config.num_labels, std=config.initializer_range, **options)

    @functional
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        *,
        num_items_in_batch: Any = None,
        document_ids: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Scores [B, C]; labels are classes [B], numbers [B] or [B, C], or many classes [B, C] by `problem_type`.

        The last real token is told by the mask if given, else by pad_token_id, else it is the last column.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, return_dict=True,
        )  # fmt: skip
        x_BTD = out.last_hidden_state
        column_B = last_token(self._real_tokens(input_ids, attention_mask, x_BTD))
        pooled_BD = x_BTD[jnp.arange(x_BTD.shape[0]), column_B]
        logits = self.score(pooled_BD)
        loss = None
        if labels is not None:
            labels = labels_array(self.config, labels, logits)
            loss = divided(*classification_loss(self.config, logits, labels), num_items_in_batch)
        output = SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    def _real_tokens(self, input_ids: Any, attention_mask: Any, x_BTD: Array) -> Array:
        """[B, T]: what counts as a token when looking for the last one."""
        if attention_mask is not None:
            mask = jnp.atleast_2d(jnp.asarray(attention_mask))
            return mask[:, mask.shape[1] - x_BTD.shape[1] :]
        if self.config.pad_token_id is not None and input_ids is not None:
            return integers("input_ids", input_ids) != self.config.pad_token_id
        return jnp.ones(x_BTD.shape[:2])


class MistralForTokenClassification(PreTrainedModel):
    """One set of scores for each token."""

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
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.model = MistralModel(config, attn_implementation=attn_implementation, dtype=dtype, **options)
        self.score = Head(config.hidden_size, config.num_labels, bias=True, std=config.initializer_range, **options)

    @functional
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        *,
        num_items_in_batch: Any = None,
        document_ids: Any = None,
        return_dict: bool | None = None,
        rngs: Any = None,
        **options: Any,
    ) -> TokenClassifierOutput:
        """Scores [B, T, C]; labels [B, T] are classes or -100."""
        body_rngs, key = dropout_keys(rngs, 2)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, rngs=body_rngs, return_dict=True,
        )  # fmt: skip
        x_BTD = out.last_hidden_state
        if rngs is not None and self.config.classifier_dropout:
            kept = 1 - self.config.classifier_dropout
            x_BTD = jnp.where(jax.random.bernoulli(key, kept, x_BTD.shape), x_BTD / kept, 0)
        logits = self.score(x_BTD)
        loss = None
        labels = integers("labels", labels)
        if labels is not None:
            if not is_traced(x_BTD, labels):
                validate.check_labels("labels", to_numpy(labels), x_BTD.shape[:2], self.config.num_labels)
            loss = divided(*cross_entropy(logits, labels), num_items_in_batch)
        output = TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)


class MistralForQuestionAnswering(PreTrainedModel):
    """Where an answer starts and ends."""

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
        dtype, param_dtype = as_dtypes(dtype, param_dtype)
        options = {"param_dtype": param_dtype, "rngs": rngs or nnx.Rngs(0)}
        self.model = MistralModel(config, attn_implementation=attn_implementation, dtype=dtype, **options)
        self.qa_outputs = Head(config.hidden_size, 2, bias=True, std=config.initializer_range, **options)

    @functional
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        *,
        num_items_in_batch: Any = None,
        document_ids: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> QuestionAnsweringOutput:
        """Scores [B, T] of each token as start and as end; positions [B] beyond the text are not counted."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, return_dict=True,
        )  # fmt: skip
        logits = self.qa_outputs(out.last_hidden_state)
        start_logits, end_logits = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            start = integers("start_positions", start_positions, rank=1)
            end = integers("end_positions", end_positions, rank=1)
            loss = divided(*span_loss(start_logits, end_logits, start, end), num_items_in_batch)
        output = QuestionAnsweringOutput(loss, start_logits, end_logits, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)
