"""What is looked at: a text, several texts padded or packed, a chat; as ids, mask and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import EmptyInputError, InputError, SequenceTooLongError
from ..reference.ops import token_order
from ..text.tokenizer import MistralTokenizer
from .labels import labels
from .panel import Token

FEW_TOKENS = 2048
"""Larger matrices are not drawn."""
PADDING = "pad"

Source = str | Sequence[Any]
"""A text, a list of texts, a chat (a list of messages), or a list of chats."""


class Rows(NamedTuple):
    """A batch, and what its tokens are called."""

    input_ids: Array
    attention_mask: Array
    """[B, T] int32, as the ids are."""
    document_ids: Array | None
    tokens: tuple[tuple[Token, ...], ...]


def read(tokenizer: MistralTokenizer, source: Source, *, padding_side: str = "left", packed: bool = False) -> Rows:
    """Texts or chats as one batch [B, T], or packed into one row told apart by `document_ids`.

    Raises EmptyInputError, InputError, SequenceTooLongError, and what the tokenizer raises.
    """
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    rows = [_ids(tokenizer, each) for each in _several(source)]
    if not all(rows):
        raise EmptyInputError("the text has no token; give some words.")
    documents = None
    if packed:
        documents = np.repeat(np.arange(len(rows), dtype=np.int32), [len(row) for row in rows])[None]
        rows = [[token for row in rows for token in row]]
    longest = max(map(len, rows))
    if longest > FEW_TOKENS:
        raise SequenceTooLongError(f"{longest} tokens; a picture holds {FEW_TOKENS}: give a part of the text.")
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids, mask = np.full((len(rows), longest), fill, np.int32), np.zeros((len(rows), longest), np.int32)
    for row, found in enumerate(rows):
        real = slice(longest - len(found), None) if padding_side == "left" else slice(len(found))
        ids[row, real], mask[row, real] = found, 1
    return Rows(ids, mask, documents, _tokens(tokenizer, ids, mask, documents))


def is_chat(source: Any) -> bool:
    """Whether it is a list of messages."""
    return not isinstance(source, str) and len(source) > 0 and all(isinstance(each, Mapping) for each in source)


def _several(source: Any) -> list[Any]:
    if isinstance(source, str) or (isinstance(source, Sequence) and is_chat(source)):
        return [source]
    if not isinstance(source, Sequence) or not source:
        raise InputError(f"text must be a text, a list of texts or a list of messages, got {source!r}.")
    return list(source)


def _ids(tokenizer: MistralTokenizer, source: Any) -> list[int]:
    if isinstance(source, str):
        return tokenizer.encode(source)
    if not isinstance(source, Sequence) or not is_chat(source):
        raise InputError(f"text must be a text or a list of messages, got {source!r}.")
    is_open = source[-1].get("role") == "assistant"  # an answer that the model would go on with
    return list(
        tokenizer.apply_chat_template(source, add_generation_prompt=not is_open, continue_final_message=is_open)
    )


def _tokens(tokenizer: MistralTokenizer, ids: Array, mask: Array, documents: Array | None) -> tuple[Any, ...]:
    order = token_order(mask, np.zeros(len(ids), int))
    special, rows = set(tokenizer.all_special_ids), []
    for row in range(len(ids)):
        found = labels(tokenizer, ids[row].tolist())
        rows.append(
            tuple(
                Token(
                    label if real else PADDING,
                    int(position) if real else None,
                    None if documents is None else int(documents[row, column]),
                    bool(real) and int(ids[row, column]) in special,
                )
                for column, (label, position, real) in enumerate(zip(found, order[row], mask[row], strict=True))
            )
        )
    return tuple(rows)
