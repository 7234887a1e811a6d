"""How the next token is chosen: the filters, noise and choice of `mistral_core.reference.sampling` on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from mistral_core.generation.sampling import Rule, Values

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Choice(NamedTuple):
    """What is chosen from logits [B, T, V]."""

    token: Tensor
    """[B, T] int32, -1 where there was nothing to choose from: no finite score, or a NaN."""
    scores: Tensor | None
    """[B, T, V] float32: what was chosen from, -inf where a filter forbids; None where the rule does not ask."""
    candidates: tuple[Tensor, Tensor, Tensor] | None
    """The C best of each place [B, T, C]: score with noise, score, token; None where the rule asks for none."""
    logits: Tensor | None
    """The logits, where the rule asks."""


def threefry(key: tuple[Tensor, Tensor], count: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds: two uint32 words of a key and a counter of two each."""
    keys = (*key, key[0] ^ key[1] ^ tf.constant(0x1BD11BDA, tf.uint32))
    x0, x1 = count[0] + keys[0], count[1] + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = _shifted_left(x1, rotation) | _shifted_right(x1, 32 - rotation)
            x1 = x1 ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + tf.constant(block + 1, tf.uint32)
    return x0, x1


def _shifted_left(x: Tensor, count: int) -> Tensor:
    return tf.bitwise.left_shift(x, tf.constant(count, tf.uint32))


def _shifted_right(x: Tensor, count: int) -> Tensor:
    return tf.bitwise.right_shift(x, tf.constant(count, tf.uint32))


def gumbel(key_B2: Tensor, step_BT: Tensor, size: int) -> Tensor:
    """Noise [B, T, V] float32 of each row's key and each token's step."""
    half = (size + 1) // 2
    key_B2, step_BT1 = tf.cast(key_B2, tf.uint32), tf.cast(step_BT, tf.uint32)[:, :, None]
    count = step_BT1 + tf.zeros([half], tf.uint32), tf.zeros_like(step_BT1) + tf.cast(tf.range(half), tf.uint32)
    words = threefry((key_B2[:, None, None, 0], key_B2[:, None, None, 1]), count)
    bits = tf.concat(words, axis=-1)[..., :size]
    return -tf.math.log(-tf.math.log((tf.cast(_shifted_right(bits, 9), tf.float32) + 0.5) * 2.0**-23))


def temperature(scores: Tensor, value: Tensor) -> Tensor:
    """Scores divided by the temperature."""
    return scores / value


def top_k(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the k highest scores, and what equals the last of them."""
    ordered = tf.sort(scores, axis=-1, direction="DESCENDING")
    last = tf.minimum(tf.cast(value, tf.int32), scores.shape[-1]) - 1
    return tf.where(scores < tf.gather(ordered, last, axis=-1)[..., None], -math.inf, scores)


def top_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the likeliest tokens until their probabilities reach p."""
    ordered = tf.sort(scores, axis=-1, direction="DESCENDING")
    return tf.where(scores < _last_within(ordered, tf.nn.softmax(ordered), value), -math.inf, scores)


def min_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep what is at least min_p times as likely as the likeliest."""
    return tf.where(scores < tf.reduce_max(scores, -1, keepdims=True) + tf.math.log(value), -math.inf, scores)


def typical_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest the entropy, until they reach p."""
    probability = tf.nn.softmax(scores)
    surprise = -tf.math.log(tf.where(probability > 0, probability, 1))
    entropy = tf.reduce_sum(probability * surprise, -1, keepdims=True)
    distance = tf.where(probability > 0, tf.abs(surprise - entropy), math.inf)
    order = tf.argsort(distance, axis=-1, stable=True)
    nearest, ordered = (tf.gather(x, order, batch_dims=2) for x in (distance, probability))
    return tf.where(distance > -_last_within(-nearest, ordered, value), -math.inf, scores)


def _last_within(ordered: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
    """The last of the ordered values that are needed to reach a probability mass; the first always is."""
    before = tf.cumsum(probability, axis=-1) - probability
    needed = tf.maximum(tf.reduce_sum(tf.cast(before < mass, tf.int32), -1, keepdims=True), 1)
    return tf.gather(ordered, needed - 1, batch_dims=2)


FILTERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
    "typical_p": typical_p,
}
"""In the order in which they are applied."""


def penalized(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Tokens of the row so far made less likely: divided by the penalty, or times it below 0."""
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(logits: Tensor, rule: Rule, values: Values) -> Choice:
    """One token for each place of logits [B, T, V]."""
    scores = tf.nn.log_softmax(logits) if rule.candidates else logits
    if values.bias is not None:
        scores = scores + values.bias
    if values.seen is not None:
        scores = penalized(scores, values.seen, values.number("repetition_penalty"))
    for name in rule.filters:
        scores = FILTERS[name](scores, values.number(name))
    noisy = scores
    if rule.sample:
        step_BT = values.step[:, None] + tf.range(tf.shape(logits)[1])
        noisy = scores + gumbel(values.key, step_BT, logits.shape[-1])
    # a NaN is looked for by itself: TensorFlow's largest may pass it over
    fine = tf.math.is_finite(tf.reduce_max(noisy, -1)) & ~tf.reduce_any(tf.math.is_nan(noisy), -1)
    token = tf.where(fine, tf.argmax(noisy, -1, tf.int32), -1)
    candidates = None
    if rule.candidates:
        top, tokens = tf.math.top_k(noisy, rule.candidates)
        candidates = top, tf.gather(scores, tokens, batch_dims=2), tokens
    return Choice(token, scores if rule.scores else None, candidates, logits if rule.logits else None)
