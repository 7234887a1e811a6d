"""What a model returns: the same NamedTuples in every backend.

A NamedTuple is a pytree in JAX and a nest in TensorFlow as it is. Besides attributes, `out["logits"]` works, and
`to_tuple()` leaves out what is None, in Hugging Face's order. An integer index counts every field, None or not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any
"""A NumPy, torch, JAX or TensorFlow array."""


def _getitem(self: tuple[Any, ...], key: Any) -> Any:
    return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)


def _to_tuple(self: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value for value in self if value is not None)


class ModelOutput(NamedTuple):
    """Of MistralModel."""

    last_hidden_state: Array
    """[B, T, D], after the final norm."""
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    """L + 1 arrays [B, T, D]: the embeddings, then each layer's output, the last one after the final norm."""
    attentions: tuple[Array, ...] | None = None
    """L arrays [B, N, T, S]: each layer's attention weights."""

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)


class CausalLMOutput(NamedTuple):
    """Of MistralForCausalLM."""

    loss: Array | None = None
    """Scalar float32: mean cross entropy of the next token where its label is not -100."""
    logits: Array | None = None
    """[B, T, V] float32."""
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)


class SequenceClassifierOutput(NamedTuple):
    """Of MistralForSequenceClassification."""

    loss: Array | None = None
    logits: Array | None = None
    """[B, C] float32, read at the last real token."""
    past_key_values: Any = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)


class TokenClassifierOutput(NamedTuple):
    """Of MistralForTokenClassification."""

    loss: Array | None = None
    logits: Array | None = None
    """[B, T, C] float32."""
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)


class QuestionAnsweringOutput(NamedTuple):
    """Of MistralForQuestionAnswering."""

    loss: Array | None = None
    start_logits: Array | None = None
    """[B, T] float32."""
    end_logits: Array | None = None
    """[B, T] float32."""
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)


class GenerateOutput(NamedTuple):
    """Of `generate(return_dict_in_generate=True)`; as the next call's past_key_values it continues where this ended."""

    sequences: Array
    """[B, T + new]: prompt and continuation, ended rows padded; B rows, or num_return_sequences for each of them.
    After inputs_embeds alone, only what is new."""
    sequences_scores: Array | None = None
    """[B] float32: of beams, the sum of log-probabilities over length ** length_penalty."""
    scores: tuple[Array, ...] | None = None
    """[B, V] float32 for each new token: what it was chosen from, -inf for what could not come; of beams, a row for
    each beam that was running."""
    logits: tuple[Array, ...] | None = None
    """[B, V] float32 for each new token: the model's own."""
    beam_indices: Array | None = None
    """[B, new]: of beams, the row of `scores` that each new token was chosen from, -1 after the end."""
    attentions: tuple[tuple[Array, ...], ...] | None = None
    """For each new token, L arrays: [B, N, T, T] of the prompt, then [B, N, 1, T + 1] and so on."""
    hidden_states: tuple[tuple[Array, ...], ...] | None = None
    """For each new token, L + 1 arrays: [B, T, D] of the prompt, then [B, 1, D]."""
    past_key_values: Any = None
    """The cache of all tokens but the last of each row; None of beams."""
    attention_mask: Array | None = None
    """[B, T + new]: 1 for real tokens."""

    def __getitem__(self, key: Any) -> Any:
        return _getitem(self, key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return _to_tuple(self)
