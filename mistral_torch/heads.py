"""The four heads: a MistralModel and a projection; logits are float32 in every precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral_core import MistralConfig, validate
from mistral_core.classes import runs_its_own
from mistral_core.errors import InputError
from mistral_core.loss_chunks import chunk_rows

from .arrays import integers, is_traced, labels_array, to_numpy
from .foreign_calls import GeneratesForClients
from .generate import Engine
from .layers import Head, last_token
from .losses import chunked_cross_entropy, classification_loss, cross_entropy, divided, span_loss
from .model import MistralModel
from .outputs import CausalLMOutput, Later, QuestionAnsweringOutput, SequenceClassifierOutput, TokenClassifierOutput
from .products import PackedWeight
from .weights import PreTrainedModel


class MistralForCausalLM(PreTrainedModel, GeneratesForClients):
    """Predicts the next token."""

    loss_type = "ForCausalLM"  # as transformers' Trainer calls it: the first label of a row does not count

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.of(config)
        super().__init__(config)
        self.model = MistralModel(config, attn_implementation=attn_implementation)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.initialise("lm_head")
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one tensor where the config ties them, also where something wraps the head."""
        if self.config.tie_word_embeddings:
            head = next((module for module in self.lm_head.modules() if isinstance(module, Head)), self.lm_head)
            # put there, not assigned: under accelerate's init_empty_weights an assignment makes a copy
            head._parameters["weight"] = self.model.embed_tokens.weight

    def forward(
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
        many tokens the loss holds the logits at a time (0: of all), by default chosen in training: logits of 256 MiB
        and more are never whole, and the output's are computed when they are read. Options are those of MistralModel.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, return_dict=True,
        )  # fmt: skip
        x_BTD = out.last_hidden_state
        loss = None
        labels = integers("labels", labels, self.device)
        logits_to_keep = validate.count_or_indices(logits_to_keep)
        if not is_traced(x_BTD):
            validate.check_logits_to_keep(logits_to_keep, x_BTD.shape[1])
            if labels is not None:
                validate.check_labels("labels", to_numpy(labels), x_BTD.shape[:2], self.config.vocab_size)
        rows = 0
        if labels is not None and not is_traced(x_BTD):
            training = self.training and torch.is_grad_enabled()
            rows = chunk_rows(loss_chunk, labels.numel(), self.config.vocab_size, training=training)
        factor = _factor(self.lm_head) if rows else None
        if factor is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=-100)
            loss = divided(*chunked_cross_entropy(x_BTD, factor, following, rows=rows), num_items_in_batch)
            logits = _logits_when_read(self.lm_head, _kept(x_BTD, logits_to_keep))
        else:
            logits = self.lm_head(_kept(x_BTD, 0 if labels is not None else logits_to_keep))
            if labels is not None:
                loss = divided(*cross_entropy(logits[:, :-1], labels[:, 1:]), num_items_in_batch)
                logits = _kept(logits, logits_to_keep)
        output = CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    if TYPE_CHECKING:  # an editor sees what a call returns
        __call__ = forward

    def _engine(self, compile: str) -> Engine:
        return Engine(self, compile)

    def _as_numpy(self, x: Any) -> Any:
        return to_numpy(x) if isinstance(x, Tensor) else x

    def _as_array(self, x: Any) -> Tensor:
        return torch.from_numpy(x).to(self.device)


def _kept(x: Tensor, logits_to_keep: Any) -> Tensor:
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:] if logits_to_keep else x
    return x[:, torch.as_tensor(logits_to_keep, device=x.device)]


def _factor(head: nn.Module) -> Tensor | PackedWeight | None:
    """The matrix of a head that is this matrix and nothing else: not wrapped, hooked, compiled or cut."""
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    own = hasattr(type(head), "factor") and runs_its_own(head, "forward")
    if not own or head._compiled_call_impl or any(hooks):
        return None
    return None if isinstance(head.factor, Tensor) and is_traced(head.factor) else head.factor


def _logits_when_read(head: nn.Module, x_BTD: Tensor) -> Later:
    """What a head gives, computed when it is read; raises InputError where the head is no longer what it was."""

    def state() -> list[tuple[int, int]]:
        return [(id(x), x._version) for x in (*head.parameters(), *head.buffers())]

    was = state()

    def logits() -> Tensor:
        if state() != was:
            raise InputError(
                "logits: they are computed when they are read, and the head has changed since the call; read them "
                "before the optimizer's step, or call with loss_chunk=0."
            )
        return head(x_BTD)

    return Later(logits)


class MistralForSequenceClassification(PreTrainedModel):
    """One set of scores for each row, read at its last real token."""

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.of(config)
        super().__init__(config)
        self.model = MistralModel(config, attn_implementation=attn_implementation)
        self.score = Head(config.hidden_size, config.num_labels, bias=False)
        self.initialise("score")

    def forward(
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
        pooled_BD = x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), column_B]
        logits = self.score(pooled_BD)
        loss = None
        if labels is not None:
            labels = labels_array(self.config, labels, logits)
            loss = divided(*classification_loss(self.config, logits, labels), num_items_in_batch)
        output = SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    if TYPE_CHECKING:  # an editor sees what a call returns
        __call__ = forward

    def _real_tokens(self, input_ids: Any, attention_mask: Any, x_BTD: Tensor) -> Tensor:
        """[B, T]: what counts as a token when looking for the last one."""
        if attention_mask is not None:
            mask = torch.atleast_2d(torch.as_tensor(attention_mask, device=x_BTD.device))
            return mask[:, mask.shape[1] - x_BTD.shape[1] :]
        if self.config.pad_token_id is not None and input_ids is not None:
            return integers("input_ids", input_ids, x_BTD.device) != self.config.pad_token_id
        return torch.ones(x_BTD.shape[:2], device=x_BTD.device)


class MistralForTokenClassification(PreTrainedModel):
    """One set of scores for each token."""

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.of(config)
        super().__init__(config)
        self.model = MistralModel(config, attn_implementation=attn_implementation)
        self.score = Head(config.hidden_size, config.num_labels)
        self.initialise("score")

    def forward(
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
    ) -> TokenClassifierOutput:
        """Scores [B, T, C]; labels [B, T] are classes or -100."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, document_ids=document_ids,
            **options, return_dict=True,
        )  # fmt: skip
        x_BTD = F.dropout(out.last_hidden_state, self.config.classifier_dropout, self.training)
        logits = self.score(x_BTD)
        loss = None
        labels = integers("labels", labels, self.device)
        if labels is not None:
            if not is_traced(x_BTD):
                validate.check_labels("labels", to_numpy(labels), x_BTD.shape[:2], self.config.num_labels)
            loss = divided(*cross_entropy(logits, labels), num_items_in_batch)
        output = TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    if TYPE_CHECKING:  # an editor sees what a call returns
        __call__ = forward


class MistralForQuestionAnswering(PreTrainedModel):
    """Where an answer starts and ends."""

    def __init__(self, config: MistralConfig, *, attn_implementation: str | None = None) -> None:
        config = MistralConfig.of(config)
        super().__init__(config)
        self.model = MistralModel(config, attn_implementation=attn_implementation)
        self.qa_outputs = Head(config.hidden_size, 2)
        self.initialise("qa_outputs")

    def forward(
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
            start = integers("start_positions", start_positions, self.device, rank=1)
            end = integers("end_positions", end_positions, self.device, rank=1)
            loss = divided(*span_loss(start_logits, end_logits, start, end), num_items_in_batch)
        output = QuestionAnsweringOutput(loss, start_logits, end_logits, out.hidden_states, out.attentions)
        return self.as_tuple_if_asked(output, return_dict)

    if TYPE_CHECKING:  # an editor sees what a call returns
        __call__ = forward
