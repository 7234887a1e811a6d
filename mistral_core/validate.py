"""The checks of model inputs, made in NumPy before any framework sees them.

JAX clamps an id that is out of range, XLA clamps, TensorFlow on GPU returns zeros: so eager calls come through here.
Under tracing and compilation there are no values to look at and the checks are skipped; `generate` checks before it
compiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array
from .config import MistralConfig
from .errors import (
    CacheOverflowError,
    EmptyInputError,
    InputError,
    MaskError,
    NonFiniteInputError,
    PositionError,
    SequenceTooLongError,
    TokenIdError,
)

IGNORE = -100
"""The label that no loss counts."""


def integers(name: str, value: Any, error: type[InputError] = TokenIdError) -> Array:
    """Lists or arrays of integers as an int64 array [B, T]; one dimension is a batch of one.

    Raises `error` for ragged lists, floats, bools, strings and other than one or two dimensions.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as cause:
        raise error(f"{name}: rows of different lengths; pad them and give an attention_mask.") from cause
    if array.dtype.kind not in "iu" and array.size:
        raise error(f"{name} must be integers, got {array.dtype}.")
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise error(f"{name} must have the shape [batch, tokens], got {array.shape}.")
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise error(f"{name}: {array.max()} is beyond int64.")
    return array.astype(np.int64)


def mask(value: Any) -> Array:
    """An attention mask of bools, integers or floats, all 0 or 1, as an int64 array [B, S].

    Raises MaskError, for additive masks too.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as cause:
        raise MaskError("attention_mask must have the shape [batch, tokens], got rows of different lengths.") from cause
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise MaskError(f"attention_mask must have the shape [batch, tokens], got {array.shape}.")
    if array.dtype.kind not in "biufV" or not np.isin(array.astype(np.float32), (0, 1)).all():
        raise MaskError("attention_mask must be 1 for real tokens and 0 for padding; additive masks are not taken.")
    return array.astype(np.int64)


def check_call(
    config: MistralConfig,
    *,
    input_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    attention_mask: Array | None = None,
    position_ids: Array | None = None,
    document_ids: Array | None = None,
    past_length: Array | None = None,
    past_shape: tuple[int, ...] | None = None,
    capacity: int | None = None,
) -> None:
    """Check the arrays of one model call against the config, each other and the cache.

    `past_shape` is the shape [B, R, K, H] of the first layer's keys with the number of layers in front.
    Raises TokenIdError, MaskError, PositionError, SequenceTooLongError, CacheOverflowError, EmptyInputError,
    NonFiniteInputError or InputError; nothing has been written to the cache then.
    """
    batch, tokens = _check_tokens(config, input_ids, inputs_embeds)
    if past_length is not None and past_shape is not None:
        _check_cache(config, batch, past_length, past_shape)
    length = np.zeros(batch, np.int64) if past_length is None else past_length
    new = np.full(batch, tokens) if attention_mask is None else _new_tokens(attention_mask, batch, tokens, past_length)
    total = length + new
    if capacity is not None and total.max() > capacity:
        raise CacheOverflowError(
            f"past_key_values: room for {capacity} tokens a row, {total.max()} would be needed; "
            "allocate a cache with a larger capacity, or a rolling one. The cache is unchanged."
        )
    if total.max() > config.max_position_embeddings:
        raise SequenceTooLongError(
            f"{total.max()} tokens in a row, max_position_embeddings is {config.max_position_embeddings}; shorten the "
            "text, or load with a larger max_position_embeddings if the model is meant to go there."
        )
    if position_ids is not None:
        _check_positions(config, position_ids, batch, tokens)
    if document_ids is not None:
        if document_ids.shape != (batch, tokens):
            raise InputError(f"document_ids must have the shape [{batch}, {tokens}], got {document_ids.shape}.")
        if past_length is not None:
            raise InputError("document_ids: packed documents and past_key_values exclude each other; drop one.")


def _check_tokens(config: MistralConfig, ids: Array | None, embeds: Array | None) -> tuple[int, int]:
    if (ids is None) == (embeds is None):
        raise InputError("give either input_ids or inputs_embeds, not both and not neither.")
    name, array = ("input_ids", ids) if ids is not None else ("inputs_embeds", embeds)
    assert array is not None
    if embeds is not None:
        if embeds.ndim != 3 or embeds.shape[-1] != config.hidden_size:
            raise InputError(
                f"inputs_embeds must have the shape [batch, tokens, {config.hidden_size}], got {embeds.shape}."
            )
        if not np.isfinite(embeds.astype(np.float32)).all():
            raise NonFiniteInputError("inputs_embeds: NaN or infinity; look at what made them.")
    if 0 in array.shape[:2]:
        raise EmptyInputError(f"{name}: shape {array.shape} holds no token; give at least one row of one token.")
    if ids is not None:
        check_ids("input_ids", ids, config.vocab_size)
    return array.shape[0], array.shape[1]


def check_ids(name: str, ids: Array, vocab_size: int, *, ignore: int | None = None) -> None:
    """Raise TokenIdError unless every id is in [0, vocab_size) or equals `ignore`."""
    if ids.dtype.kind not in "iu":
        raise TokenIdError(f"{name} must be integers, got {ids.dtype}.")
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        wrong &= ids != ignore
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        hint = " (-100 belongs in labels; give real ids and an attention_mask)" if ids[where] == IGNORE else ""
        raise TokenIdError(f"{name} must be 0 to {vocab_size - 1}, got {ids[where]} at {list(where)}{hint}.")


def _new_tokens(attention_mask: Array, batch: int, tokens: int, past_length: Array | None) -> Array:
    """[B]: real tokens among the new columns; a mask over past and new must agree with the cache about the past."""
    columns = attention_mask.shape[-1]
    fits = columns == tokens if past_length is None else columns >= tokens
    if attention_mask.shape[0] != batch or not fits:
        raise MaskError(f"attention_mask must have the shape [{batch}, {tokens}], got {attention_mask.shape}.")
    past = attention_mask[:, : columns - tokens].sum(axis=1)
    if columns > tokens and past_length is not None and not np.array_equal(past, past_length):
        raise MaskError(
            f"attention_mask: {past.tolist()} real tokens before the new ones, the cache holds {past_length.tolist()}; "
            "give the mask of all tokens so far, or of the new ones only."
        )
    return attention_mask[:, columns - tokens :].sum(axis=1)


def _check_cache(config: MistralConfig, batch: int, length: Array, shape: tuple[int, ...]) -> None:
    layers, rows, _, kv_heads, head_dim = shape
    found = (layers, rows, kv_heads, head_dim)
    expected = (config.num_hidden_layers, batch, config.num_key_value_heads, config.head_dim)
    if found != expected or length.shape != (batch,):
        raise InputError(
            f"past_key_values: (layers, batch, key/value heads, head_dim) must be {expected}, got {found}; "
            "the cache is of another model or batch."
        )


def _check_positions(config: MistralConfig, positions: Array, batch: int, tokens: int) -> None:
    if positions.shape not in ((batch, tokens), (1, tokens)):
        raise PositionError(f"position_ids must have the shape [{batch}, {tokens}], got {positions.shape}.")
    if positions.min() < 0 or positions.max() >= config.max_position_embeddings:
        raise PositionError(
            f"position_ids must be from 0 to {config.max_position_embeddings - 1}, "
            f"got {positions.min()} to {positions.max()}."
        )


def begins_again(
    position_ids: Array | None, attention_mask: Array | None, document_ids: Array | None, past_length: Array | None
) -> bool:
    """Whether positions tell packed documents, each of which begins where a position is not above the one before it.

    Raises PositionError where they do and a mask or a cache leaves open which tokens belong together.
    """
    if position_ids is None or document_ids is not None:
        return False
    columns, real = position_ids.shape[1], np.ones_like(position_ids)
    if attention_mask is not None:
        position_ids, real = np.broadcast_arrays(position_ids, attention_mask[:, attention_mask.shape[1] - columns :])
    for positions, is_real in zip(position_ids, real, strict=True):
        steps = np.diff(positions[is_real != 0])
        if (steps <= 0).any() and (attention_mask is not None or past_length is not None):
            raise PositionError(
                "position_ids: they begin again, beside an attention_mask or past_key_values; tell packed documents "
                "apart by document_ids, or leave the mask out."
            )
        if (steps <= 0).any():
            return True
    return False


def count_or_indices(given: Any) -> Any:
    """A count of NumPy or a framework as Python's int; indices as they are."""
    return int(given) if not isinstance(given, int) and getattr(given, "ndim", None) == 0 else given


def check_logits_to_keep(logits_to_keep: Any, tokens: int) -> None:
    """An int from 0 (all) to T, or indices in [0, T); raises InputError."""
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        if not 0 <= logits_to_keep <= tokens:
            raise InputError(f"logits_to_keep must be 0 (all) to {tokens}, got {logits_to_keep}.")
        return
    index = np.asarray(logits_to_keep)
    if index.ndim != 1 or index.dtype.kind not in "iu" or (index < -tokens).any() or (index >= tokens).any():
        raise InputError(f"logits_to_keep must be an int or indices below {tokens}, got {logits_to_keep!r}.")


def check_labels(name: str, labels: Array, shape: tuple[int, ...], classes: int) -> None:
    """Class labels of a given shape, each in [0, classes) or -100; raises InputError or TokenIdError."""
    if labels.shape != shape:
        raise InputError(f"{name} must have the shape {list(shape)}, got {labels.shape}.")
    check_ids(name, labels, classes, ignore=IGNORE)


def check_row_labels(config: MistralConfig, labels: Array, shape: tuple[int, ...]) -> None:
    """Labels of a row classifier with scores [B, C]: classes [B], or numbers [B] (C = 1) or [B, C]."""
    batch, classes = shape
    if config.problem(float_labels=labels.dtype.kind not in "iu") == "single_label_classification":
        check_labels("labels", labels.reshape(-1), (batch,), classes)
    elif labels.shape != shape and not (classes == 1 and labels.shape == (batch,)):
        raise InputError(f"labels must have the shape {list(shape)}, got {labels.shape}.")
