"""What the text so far asks of the next token: the options of `generate` that look back, in NumPy for every backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array
from ..errors import GenerationConfigError
from .checks import biases, several
from .options import GenerationConfig


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
    bias = np.zeros(shape, np.float32) if generation.logit_bias or generation.forbids else None
    seen = np.zeros(shape, bool) if generation.repetition_penalty != 1 else None
    if bias is None and seen is None:
        return None, None
    for row, tokens in enumerate(rows):
        for column in range(0 if ended[row] else len(drafts[row]) + 1):
            text = np.array([*tokens, *drafts[row][:column]], np.int64)
            if seen is not None:
                seen[row, column, text] = True
            if bias is not None:
                bias[row, column] = _bias(generation, size, text, made[row] + column)
                if np.isneginf(bias[row, column]).all():
                    raise GenerationConfigError(
                        f"row {row}, new token {made[row] + column}: bad_words_ids, no_repeat_ngram_size, "
                        "suppress_tokens, min_new_tokens and their like together forbid every token; relax one."
                    )
    return bias, seen


def _bias(generation: GenerationConfig, size: int, text: Array, made: int) -> Array:
    if (forced := _forced(generation, made)) is not None:
        bias = np.full(size, -np.inf, np.float32)
        bias[list(forced)] = 0
        return bias
    bias = np.zeros(size, np.float32)
    for token, value in (generation.logit_bias or {}).items():
        bias[token] += value
    for ids, value in biases(generation.sequence_bias):
        if _ends_with(text, ids[:-1]):
            bias[ids[-1]] += value
    if made < generation.min_new_tokens:
        bias[list(generation.eos_token_ids)] = -np.inf
    for word in generation.bad_words_ids or ():
        if _ends_with(text, word[:-1]):
            bias[word[-1]] = -np.inf
    if n := generation.no_repeat_ngram_size:
        bias[repeating(text, n)] = -np.inf
    bias[list(several(generation.suppress_tokens))] = -np.inf
    if made == (generation.forced_bos_token_id is not None):
        bias[list(several(generation.begin_suppress_tokens))] = -np.inf
    return bias


def _forced(generation: GenerationConfig, made: int) -> tuple[int, ...] | None:
    """What alone may come: the first token, or one of the last."""
    if made == generation.max_new_tokens - 1 and generation.forced_eos_token_id is not None:
        return several(generation.forced_eos_token_id)
    return several(generation.forced_bos_token_id) if made == 0 and generation.forced_bos_token_id is not None else None


def _ends_with(text: Array, ids: Sequence[int]) -> bool:
    return len(ids) <= len(text) and (not ids or tuple(text[len(text) - len(ids) :]) == tuple(ids))


def repeating(text: Array, n: int) -> Array:
    """The tokens that would make the last n tokens of a text a sequence that it already holds."""
    if len(text) < n:
        return text[:0]
    windows = np.lib.stride_tricks.sliding_window_view(text, n)
    return windows[(windows[:, :-1] == text[len(text) - n + 1 :]).all(axis=1), -1]


def shaped(scores_BTV: Array, made_BT: Array, generation: GenerationConfig) -> Array:
    """Scores in which a forced token is certain, and ends grow with every token of an exponential decay.

    `made_BT` is how many new tokens each row has at each place.
    """
    shaped_BTV = np.array(scores_BTV)
    for place in np.argwhere(made_BT >= 0):
        if (forced := _forced(generation, int(made_BT[tuple(place)]))) is not None:
            shaped_BTV[tuple(place)] = -np.inf
            shaped_BTV[(*place, list(forced))] = 0
    if generation.exponential_decay_length_penalty is not None:
        start, factor = generation.exponential_decay_length_penalty
        with np.errstate(over="ignore"):
            growth_BT1 = np.minimum(float(factor) ** np.maximum(made_BT - start, 0) - 1, 1e30)[:, :, None]
        ends = list(generation.eos_token_ids)
        found = shaped_BTV[:, :, ends]
        with np.errstate(invalid="ignore"):
            shaped_BTV[:, :, ends] = np.where(np.isfinite(found), found + np.abs(found) * growth_BT1, found)
    return shaped_BTV
