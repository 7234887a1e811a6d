"""How much of the logits the loss of a language model holds at a time, in any framework."""

from __future__ import annotations

import operator
from typing import Any

from .errors import InputError

MANY = 2**26
"""So many logits [B, T, V] and more are never whole in training, unless asked for: 256 MiB in float32, of which the
loss of whole logits keeps three or four. Of fewer, a whole copy is small beside what layers keep, and fastest."""
CHUNK = 2**24
"""Logits of a chunk, where the size is chosen here: 64 MiB in float32. More rows use a matrix of many columns better;
with these, 128 of 131072 columns, the four products of a chunk take most of the time."""
TOKENS = 2048
"""So many tokens a batch counts for where a program is made for any number."""


def chunk_rows(loss_chunk: Any, tokens: int | None, vocab_size: int, *, training: bool) -> int:
    """How many tokens' logits are there at a time for a loss of so many tokens (None: not known); 0: all of them.

    `loss_chunk` is what a call was given: a number of tokens, 0, or None, which chooses. Raises InputError.
    """
    if loss_chunk is None:
        tokens = TOKENS if tokens is None else tokens
        return max(1, CHUNK // vocab_size) if training and tokens * vocab_size >= MANY else 0
    try:
        rows = operator.index(loss_chunk)
    except TypeError:
        rows = -1
    if rows < 0 or isinstance(loss_chunk, bool):
        raise InputError(
            f"loss_chunk must be a number of tokens, 0 (all) or None (chosen by size), got {loss_chunk!r}."
        )
    return rows
