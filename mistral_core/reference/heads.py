"""The four heads: a Mistral and a projection; logits are never rounded, in any precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..outputs import CausalLMOutput, QuestionAnsweringOutput, SequenceClassifierOutput, TokenClassifierOutput
from . import ops
from .cache import KVCache
from .model import Parameters as Parameters
from .model import forward
from .ops import Round, exact


def head_weight(config: MistralConfig, parameters: Parameters) -> Array:
    """The language model head [V, D]: the embedding itself where tied."""
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return np.asarray(parameters[name]).astype(np.float64)


def causal_lm(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array | None = None,
    num_items_in_batch: Any = None, **inputs: Any,
) -> CausalLMOutput:  # fmt: skip
    """Logits [B, T, V]; the loss of position t is that of predicting label t + 1."""
    out = forward(config, parameters, input_ids, **inputs)
    logits = ops.linear(out.last_hidden_state, head_weight(config, parameters))
    loss = None
    if labels is not None:
        loss = ops.divided(*ops.cross_entropy(logits[:, :-1], np.asarray(labels)[:, 1:]), num_items_in_batch)
    return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


def sequence_classification(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array | None = None,
    attention_mask: Array | None = None, num_items_in_batch: Any = None, **inputs: Any,
) -> SequenceClassifierOutput:  # fmt: skip
    """Scores [B, C] at the last real token: by the mask if given, else by pad_token_id, else the last column."""
    out = forward(config, parameters, input_ids, attention_mask, **inputs)
    column = last_column(config, out.last_hidden_state.shape[:2], input_ids, attention_mask)
    pooled = out.last_hidden_state[np.arange(len(column)), column]
    logits = ops.linear(pooled, np.asarray(parameters["score.weight"]).astype(np.float64))
    loss = None
    if labels is not None:
        loss = ops.divided(*classification_loss(config, logits, np.asarray(labels)), num_items_in_batch)
    return SequenceClassifierOutput(loss, logits, out.past_key_values, out.hidden_states, out.attentions)


def last_column(
    config: MistralConfig, shape: tuple[int, ...], input_ids: Array | None = None, attention_mask: Array | None = None
) -> Array:
    """[B]: the column of each row's last real token, by the mask if given, else by pad_token_id, else the last one."""
    if attention_mask is not None:
        real = np.asarray(attention_mask)
    elif config.pad_token_id is not None and input_ids is not None:
        real = np.asarray(input_ids) != config.pad_token_id
    else:
        real = np.ones(shape, int)
    return ops.last_token(np.where(real, 0, -1))


def classification_loss(config: MistralConfig, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Sum and count by problem_type; without one, a single label is regression, integers are classes, floats many."""
    kind = config.problem(float_labels=labels.dtype.kind not in "iu")
    if kind == "regression":
        return ops.squared_error(logits.reshape(labels.shape), labels)
    if kind == "single_label_classification":
        return ops.cross_entropy(logits, labels.reshape(-1))
    return ops.binary_cross_entropy(logits, labels)


def token_classification(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *, labels: Array | None = None,
    num_items_in_batch: Any = None, **inputs: Any,
) -> TokenClassifierOutput:  # fmt: skip
    """Scores [B, T, C] of every token."""
    out = forward(config, parameters, input_ids, **inputs)
    logits = _biased(out.last_hidden_state, parameters, "score")
    loss = None
    if labels is not None:
        loss = ops.divided(*ops.cross_entropy(logits, np.asarray(labels)), num_items_in_batch)
    return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


def question_answering(
    config: MistralConfig, parameters: Parameters, input_ids: Array | None = None, *,
    start_positions: Array | None = None, end_positions: Array | None = None,
    num_items_in_batch: Any = None, **inputs: Any,
) -> QuestionAnsweringOutput:  # fmt: skip
    """Scores [B, T] of where an answer starts and ends; a position beyond the text is not counted."""
    out = forward(config, parameters, input_ids, **inputs)
    logits = _biased(out.last_hidden_state, parameters, "qa_outputs")
    start, end = logits[..., 0], logits[..., 1]
    loss = None
    if start_positions is not None and end_positions is not None:
        length = start.shape[1]
        sums = [
            ops.cross_entropy(scores, np.clip(np.asarray(positions).reshape(-1), 0, length), ignore=length)
            for scores, positions in ((start, start_positions), (end, end_positions))
        ]
        total, count = map(np.stack, zip(*sums, strict=True))
        loss = ops.divided(total, count, num_items_in_batch)
    return QuestionAnsweringOutput(loss, start, end, out.hidden_states, out.attentions)


def _biased(x_BTD: Array, parameters: Parameters, name: str) -> Array:
    weight, bias = (np.asarray(parameters[f"{name}.{part}"]).astype(np.float64) for part in ("weight", "bias"))
    return ops.linear(x_BTD, weight, bias)


def greedy(
    config: MistralConfig,
    parameters: Parameters,
    input_ids: Array,
    attention_mask: Array | None = None,
    *,
    max_new_tokens: int,
    round: Round = exact,
) -> Array:
    """The `max_new_tokens` likeliest tokens [B, new] one by one, from a cache; the end of sequence does not stop it."""
    mask = np.ones_like(input_ids) if attention_mask is None else np.asarray(attention_mask)
    cache = KVCache.allocate(config, len(input_ids), mask.shape[1] + max_new_tokens)
    out = causal_lm(config, parameters, input_ids, attention_mask=mask, past_key_values=cache, round=round)
    assert out.logits is not None
    last = out.logits[np.arange(len(mask)), ops.last_token(np.where(mask != 0, 0, -1))]
    tokens = [last.argmax(axis=-1)]
    for _ in range(max_new_tokens - 1):
        out = causal_lm(config, parameters, tokens[-1][:, None], past_key_values=out.past_key_values, round=round)
        assert out.logits is not None
        tokens.append(out.logits[:, -1].argmax(axis=-1))
    return np.stack(tokens, axis=1)
