"""Another number of tokens for a model: the same new rows in every framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import MistralConfig
from ..errors import ConfigError
from ..parameters import LM_HEAD
from ..plain import is_int, plain_int
from .matching import EMBEDDING

VOCABULARY = frozenset({EMBEDDING, LM_HEAD})
"""The tensors with a row for each token."""


def resized_config(config: MistralConfig, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> MistralConfig:
    """The config with another vocab_size, rounded up to a multiple; raises ConfigError for no number of tokens."""
    size = config.vocab_size if new_num_tokens is None else plain_int(new_num_tokens)
    pad_to_multiple_of = plain_int(pad_to_multiple_of)
    for name, value in (("new_num_tokens", size), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None and (not is_int(value) or value < 1):
            raise ConfigError(f"{name} must be an integer of 1 or more, got {value!r}.")
    multiple = pad_to_multiple_of or 1
    return config.replace(vocab_size=-(-size // multiple) * multiple)


def resized_rows(rows: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """[V, D] -> [size, D]: the first rows bit for bit, new ones the mean of the old (computed in float64).

    The mean keeps the new tokens' logits near the old ones' (Hewitt 2021, "Initializing new word embeddings").
    """
    if size <= len(rows):
        return rows[:size].copy()
    mean = rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    return np.concatenate([rows, np.broadcast_to(mean, (size - len(rows), rows.shape[1]))])
