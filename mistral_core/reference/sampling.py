"""How the next token is chosen from logits: filters, noise and choice, in float64.

The noise is that of the Gumbel-max trick: argmax(score + g) is a draw from softmax(score) where every g is an
independent -log(-log(u)). u comes from a counter-based generator, so a token depends on its seed, its row and its step
and on nothing else: not on the framework, the batch, the chunking or the speculation around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..generation.sampling import Rule, Values

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Choice(NamedTuple):
    """What is chosen from logits [B, T, V]."""

    token: Array
    """[B, T] int, -1 where there was nothing to choose from: no finite score, or a NaN."""
    scores: Array | None
    """[B, T, V]: what was chosen from, -inf where a filter forbids; None where the rule does not ask."""
    candidates: tuple[Array, Array, Array] | None
    """The C best of each place [B, T, C]: score with noise, score, token; None where the rule asks for none."""


def threefry(key: tuple[Array, Array], count: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011): two uint32 words of a key and a counter of two each."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = count[0] + keys[0], count[1] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def row_keys(seed: int | Sequence[int], rows: int, copies: int) -> Array:
    """The key [rows * copies, 2] of each row: an int's stream r for row r; of a list, stream j for a row's copy j.

    A row's key is Threefry(seed; 0, stream), the seed's high word first.
    """
    if isinstance(seed, int):
        seeds, streams = np.full(rows * copies, seed, np.uint64), np.arange(rows * copies)
    else:
        seeds, streams = np.repeat(np.array(seed, np.uint64), copies), np.tile(np.arange(copies), rows)
    words = (seeds >> np.uint64(32)).astype(np.uint32), (seeds & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return np.stack(threefry(words, (np.zeros(len(seeds), np.uint32), streams.astype(np.uint32))), axis=-1)


def gumbel(key_B2: Array, step_BT: Array, size: int) -> Array:
    """Noise [B, T, V] of each row's key and each token's step.

    The counter (step, i) gives the words of the ids i and i + ceil(V / 2); u = (word // 512 + 1/2) / 2^23.
    """
    half = (size + 1) // 2
    key = key_B2[:, None, None, 0].astype(np.uint32), key_B2[:, None, None, 1].astype(np.uint32)
    count = np.broadcast_arrays(step_BT[:, :, None].astype(np.uint32), np.arange(half, dtype=np.uint32))
    bits = np.concatenate(threefry(key, (count[0], count[1])), axis=-1)[..., :size]
    return -np.log(-np.log(((bits >> np.uint32(9)) + 0.5) * 2.0**-23))


def temperature(scores: Array, value: float) -> Array:
    """Scores divided by the temperature."""
    return scores / value


def top_k(scores: Array, value: float) -> Array:
    """Keep the k highest scores, and what equals the last of them."""
    k = int(min(value, scores.shape[-1]))
    lowest = np.sort(scores, axis=-1)[..., -k, None]
    return np.where(scores < lowest, -np.inf, scores)


def top_p(scores: Array, value: float) -> Array:
    """Keep the likeliest tokens until their probabilities reach p (nucleus sampling, arXiv 1904.09751)."""
    ordered = -np.sort(-scores, axis=-1)
    return np.where(scores < _last_within(ordered, _softmax(ordered), value), -np.inf, scores)


def min_p(scores: Array, value: float) -> Array:
    """Keep what is at least min_p times as likely as the likeliest (arXiv 2407.01082)."""
    return np.where(scores < scores.max(axis=-1, keepdims=True) + np.log(value), -np.inf, scores)


def typical_p(scores: Array, value: float) -> Array:
    """Keep the tokens whose surprise is nearest the entropy, until they reach p (arXiv 2202.00666)."""
    probability = _softmax(scores)
    surprise = -np.log(np.where(probability > 0, probability, 1))
    entropy = (probability * surprise).sum(axis=-1, keepdims=True)
    distance = np.where(probability > 0, np.abs(surprise - entropy), np.inf)
    order = np.argsort(distance, axis=-1, kind="stable")
    nearest, ordered = (np.take_along_axis(x, order, axis=-1) for x in (distance, probability))
    return np.where(distance > -_last_within(-nearest, ordered, value), -np.inf, scores)


def epsilon_cutoff(scores: Array, value: float) -> Array:
    """Keep what is at least this likely, and the likeliest (arXiv 2210.15191)."""
    return _without(scores, _softmax(scores) < value)


def eta_cutoff(scores: Array, value: float) -> Array:
    """Keep what is likelier than a bound that falls where much is likely, and the likeliest (arXiv 2210.15191)."""
    probability = _softmax(scores)
    entropy = -(probability * np.log(np.where(probability > 0, probability, 1))).sum(axis=-1, keepdims=True)
    return _without(scores, probability < np.minimum(value, np.sqrt(value) * np.exp(-entropy)))


def _without(scores: Array, unlikely: Array) -> Array:
    return np.where(unlikely & (scores < scores.max(axis=-1, keepdims=True)), -np.inf, scores)


def _last_within(ordered: Array, probability: Array, mass: float) -> Array:
    """The last of the ordered values that are needed to reach a probability mass; the first always is."""
    before = np.cumsum(probability, axis=-1) - probability
    needed = np.maximum((before < mass).sum(axis=-1, keepdims=True), 1)
    return np.take_along_axis(ordered, needed - 1, axis=-1)


FILTERS: Mapping[str, Callable[[Array, float], Array]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
}
"""In the order in which they are applied; the last two here only: with them tokens are chosen in NumPy."""


def penalized(scores: Array, seen: Array, penalty: float) -> Array:
    """Tokens of the row so far made less likely: divided by the penalty, or times it below 0 (arXiv 1909.05858)."""
    return np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(logits: Array, rule: Rule, values: Values) -> Choice:
    """One token for each place of logits [B, T, V]."""
    return chosen(processed(logits, rule, values), rule, values)


def processed(logits: Array, rule: Rule, values: Values) -> Array:
    """Logits, or of beams log-probabilities, with bias and penalty."""
    scores = log_softmax(logits) if rule.candidates else logits
    if values.bias is not None:
        scores = scores + values.bias
    if values.seen is not None:
        scores = penalized(scores, values.seen, float(values.number("repetition_penalty")))
    return scores


def chosen(scores: Array, rule: Rule, values: Values) -> Choice:
    """One token for each place of processed scores [B, T, V]: filters, noise and choice."""
    for name in rule.filters:
        scores = FILTERS[name](scores, float(values.number(name)))
    scores = log_softmax(scores) if rule.normalised else scores
    noisy = scores
    if rule.sample:
        step_BT = values.step[:, None] + np.arange(scores.shape[1])
        noisy = scores + gumbel(values.key, step_BT, scores.shape[-1])
    token = np.where(np.isfinite(noisy.max(axis=-1)), noisy.argmax(axis=-1), -1)
    candidates = None
    if rule.candidates:
        best = np.argsort(-noisy, axis=-1, kind="stable")[..., : rule.candidates]
        candidates = np.take_along_axis(noisy, best, axis=-1), np.take_along_axis(scores, best, axis=-1), best
    return Choice(token, scores if rule.scores else None, candidates)


def log_softmax(x: Array) -> Array:
    """Log-probabilities."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _softmax(x: Array) -> Array:
    top = x.max(axis=-1, keepdims=True)
    weights = np.exp(x - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)
