"""What the text so far asks of the next token: the options of `generate` that look back, in NumPy for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import GenerationConfigError
from .generation import GenerationConfig
from .validate import Array


def limits(
    generation: GenerationConfig,
    size: int,
    rows: Sequence[Sequence[int]],
    made: Sequence[int],
    drafts: Sequence[Sequence[int]],
    ended: Sequence[bool],
    *,
    columns: int,
) -> tuple[Array | None, Array | None]:
    """What is added to the logits [B, T, V] and which tokens were seen [B, T, V], each None where no option asks.

    T is `columns`, at least 1 + the most guesses: each is judged as if those before it were part of the row. `made`
    is how many tokens of each row are new. Raises GenerationConfigError where nothing is left to choose from.
    """
    shape = (len(rows), columns, size)
    bias = np.zeros(shape, np.float32) if generation.logit_bias or _forbids(generation) else None
    seen = np.zeros(shape, bool) if generation.repetition_penalty != 1 else None
    if bias is None and seen is None:
        return None, None
    for row, tokens in enumerate(rows):
        for column in range(0 if ended[row] else len(drafts[row]) + 1):
            text = np.array([*tokens, *drafts[row][:column]])
            if seen is not None:
                seen[row, column, text] = True
            if bias is not None:
                bias[row, column] = _bias(generation, size, text, made[row] + column)
                if np.isneginf(bias[row, column]).all():
                    raise GenerationConfigError(
                        f"row {row}, new token {made[row] + column}: bad_words_ids, no_repeat_ngram_size and "
                        "min_new_tokens together forbid every token; relax one."
                    )
    return bias, seen


def _forbids(generation: GenerationConfig) -> bool:
    return bool(generation.no_repeat_ngram_size or generation.bad_words_ids or generation.min_new_tokens)


def _bias(generation: GenerationConfig, size: int, text: Array, made: int) -> Array:
    bias = np.zeros(size, np.float32)
    for token, value in (generation.logit_bias or {}).items():
        bias[token] += value
    if made < generation.min_new_tokens:
        bias[list(generation.eos_token_ids)] = -np.inf
    for word in generation.bad_words_ids or ():
        if len(word) - 1 <= len(text) and tuple(text[len(text) - len(word) + 1 :]) == word[:-1]:
            bias[word[-1]] = -np.inf
    if n := generation.no_repeat_ngram_size:
        bias[repeating(text, n)] = -np.inf
    return bias


def repeating(text: Array, n: int) -> Array:
    """The tokens that would make the last n tokens of a text a sequence that it already holds."""
    if len(text) < n:
        return text[:0]
    windows = np.lib.stride_tricks.sliding_window_view(text, n)
    return windows[(windows[:, :-1] == text[len(text) - n + 1 :]).all(axis=1), -1]
