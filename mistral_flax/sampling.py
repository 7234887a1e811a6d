"""How the next token is chosen: the filters, noise and choice of `mistral_core.reference.sampling` on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core.generation.sampling import Rule, Values

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Choice(NamedTuple):
    """What is chosen from logits [B, T, V]."""

    token: Array
    """[B, T] int32, -1 where there was nothing to choose from: no finite score, or a NaN."""
    scores: Array | None
    """[B, T, V] float32: what was chosen from, -inf where a filter forbids; None where the rule does not ask."""
    candidates: tuple[Array, Array, Array] | None
    """The C best of each place [B, T, C]: score with noise, score, token; None where the rule asks for none."""
    logits: Array | None
    """The logits, where the rule asks."""


def threefry(key: tuple[Array, Array], count: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds: two uint32 words of a key and a counter of two each."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = count[0] + keys[0], count[1] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x1 ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1


def gumbel(key_B2: Array, step_BT: Array, size: int) -> Array:
    """Noise [B, T, V] float32 of each row's key and each token's step."""
    half = (size + 1) // 2
    key_B2 = key_B2.astype(jnp.uint32)
    count = jnp.broadcast_arrays(step_BT.astype(jnp.uint32)[:, :, None], jnp.arange(half, dtype=jnp.uint32))
    words = threefry((key_B2[:, None, None, 0], key_B2[:, None, None, 1]), (count[0], count[1]))
    bits = jnp.concatenate(words, axis=-1)[..., :size]
    return -jnp.log(-jnp.log(((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23))


def temperature(scores: Array, value: Array) -> Array:
    """Scores divided by the temperature."""
    return scores / value


def top_k(scores: Array, value: Array) -> Array:
    """Keep the k highest scores, and what equals the last of them."""
    ordered = jnp.sort(scores, axis=-1, descending=True)
    last = jnp.minimum(value.astype(jnp.int32), scores.shape[-1]) - 1
    return jnp.where(scores < jnp.take(ordered, last, axis=-1)[..., None], -jnp.inf, scores)


def top_p(scores: Array, value: Array) -> Array:
    """Keep the likeliest tokens until their probabilities reach p."""
    ordered = jnp.sort(scores, axis=-1, descending=True)
    return jnp.where(scores < _last_within(ordered, jax.nn.softmax(ordered, axis=-1), value), -jnp.inf, scores)


def min_p(scores: Array, value: Array) -> Array:
    """Keep what is at least min_p times as likely as the likeliest."""
    return jnp.where(scores < scores.max(-1, keepdims=True) + jnp.log(value), -jnp.inf, scores)


def typical_p(scores: Array, value: Array) -> Array:
    """Keep the tokens whose surprise is nearest the entropy, until they reach p."""
    probability = jax.nn.softmax(scores, axis=-1)
    surprise = -jnp.log(jnp.where(probability > 0, probability, 1))
    entropy = (probability * surprise).sum(-1, keepdims=True)
    distance = jnp.where(probability > 0, jnp.abs(surprise - entropy), jnp.inf)
    order = jnp.argsort(distance, axis=-1, stable=True)
    nearest, ordered = (jnp.take_along_axis(x, order, axis=-1) for x in (distance, probability))
    return jnp.where(distance > -_last_within(-nearest, ordered, value), -jnp.inf, scores)


def _last_within(ordered: Array, probability: Array, mass: Array) -> Array:
    """The last of the ordered values that are needed to reach a probability mass; the first always is."""
    before = jnp.cumsum(probability, axis=-1) - probability
    needed = jnp.maximum((before < mass).sum(-1, keepdims=True), 1)
    return jnp.take_along_axis(ordered, needed - 1, axis=-1)


FILTERS: Mapping[str, Callable[[Array, Array], Array]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
}
"""In the order in which they are applied."""


def penalized(scores: Array, seen: Array, penalty: Array) -> Array:
    """Tokens of the row so far made less likely: divided by the penalty, or times it below 0."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(logits: Array, rule: Rule, values: Values) -> Choice:
    """One token for each place of logits [B, T, V]."""
    scores = jax.nn.log_softmax(logits, axis=-1) if rule.candidates else logits
    if values.bias is not None:
        scores = scores + values.bias
    if values.seen is not None:
        scores = penalized(scores, values.seen, values.number("repetition_penalty"))
    for name in rule.filters:
        scores = FILTERS[name](scores, values.number(name))
    noisy = scores
    if rule.sample:
        step_BT = values.step[:, None] + jnp.arange(logits.shape[1])[None]
        noisy = scores + gumbel(values.key, step_BT, logits.shape[-1])
    # the largest of what holds a NaN is NaN
    token = jnp.where(jnp.isfinite(noisy.max(-1)), noisy.argmax(-1), -1).astype(jnp.int32)
    candidates = None
    if rule.candidates:
        top, tokens = jax.lax.top_k(noisy, rule.candidates)
        candidates = top, jnp.take_along_axis(scores, tokens, axis=-1), tokens
    return Choice(token, scores if rule.scores else None, candidates, logits if rule.logits else None)
