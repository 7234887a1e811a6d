"""How the next token is chosen: the filters, noise and choice of `mistral_core.reference.sampling` on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_core.generation.sampling import Rule, Values

_WORD = 0xFFFFFFFF
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


class Choice(NamedTuple):
    """What is chosen from logits [B, T, V]."""

    token: Tensor
    """[B, T] int64, -1 where there was nothing to choose from: no finite score, or a NaN."""
    scores: Tensor | None
    """[B, T, V] float32: what was chosen from, -inf where a filter forbids; None where the rule does not ask."""
    candidates: tuple[Tensor, Tensor, Tensor] | None
    """The C best of each place [B, T, C]: score with noise, score, token; None where the rule asks for none."""
    logits: Tensor | None
    """The logits, where the rule asks."""


def threefry(key: tuple[Tensor, Tensor], count: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 with 20 rounds: two uint32 words of a key and a counter of two each.

    Here they are int64, because torch's uint32 cannot add.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x0, x1 = (count[0] + keys[0]) & _WORD, (count[1] + keys[1]) & _WORD
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = (x0 + x1) & _WORD
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) & _WORD
            x1 = x1 ^ x0
        x0 = (x0 + keys[(block + 1) % 3]) & _WORD
        x1 = (x1 + keys[(block + 2) % 3] + (block + 1)) & _WORD
    return x0, x1


def gumbel(key_B2: Tensor, step_BT: Tensor, size: int) -> Tensor:
    """Noise [B, T, V] float32 of each row's key and each token's step."""
    half = (size + 1) // 2
    key_B2 = key_B2.long()
    count = step_BT.long()[:, :, None], torch.arange(half, device=key_B2.device)
    words = threefry((key_B2[:, None, None, 0], key_B2[:, None, None, 1]), count)
    bits = torch.cat(words, dim=-1)[..., :size]
    return -torch.log(-torch.log(((bits >> 9).float() + 0.5) * 2.0**-23))


def temperature(scores: Tensor, value: Tensor) -> Tensor:
    """Scores divided by the temperature."""
    return scores / value


def top_k(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the k highest scores, and what equals the last of them."""
    ordered = scores.sort(dim=-1, descending=True).values
    last = (value.long().clamp(max=scores.shape[-1]) - 1).expand(*scores.shape[:-1], 1)
    return scores.masked_fill(scores < ordered.gather(-1, last), -torch.inf)


def top_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the likeliest tokens until their probabilities reach p."""
    ordered = scores.sort(dim=-1, descending=True).values
    return scores.masked_fill(scores < _last_within(ordered, ordered.softmax(-1), value), -torch.inf)


def min_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep what is at least min_p times as likely as the likeliest."""
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + value.log(), -torch.inf)


def typical_p(scores: Tensor, value: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest the entropy, until they reach p."""
    probability = scores.softmax(-1)
    surprise = -torch.log(torch.where(probability > 0, probability, 1))
    entropy = (probability * surprise).sum(-1, keepdim=True)
    distance = torch.where(probability > 0, (surprise - entropy).abs(), torch.inf)
    nearest, order = distance.sort(dim=-1, stable=True)
    lowest = -_last_within(-nearest, probability.gather(-1, order), value)
    return scores.masked_fill(distance > lowest, -torch.inf)


def _last_within(ordered: Tensor, probability: Tensor, mass: Tensor) -> Tensor:
    """The last of the ordered values that are needed to reach a probability mass; the first always is."""
    before = probability.cumsum(-1) - probability
    needed = (before < mass).sum(-1, keepdim=True).clamp(min=1)
    return ordered.gather(-1, needed - 1)


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
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(logits: Tensor, rule: Rule, values: Values) -> Choice:
    """One token for each place of logits [B, T, V]."""
    scores = logits.log_softmax(-1) if rule.candidates else logits
    if values.bias is not None:
        scores = scores + values.bias
    if values.seen is not None:
        scores = penalized(scores, values.seen, values.number("repetition_penalty"))
    for name in rule.filters:
        scores = FILTERS[name](scores, values.number(name))
    noisy = scores
    if rule.sample:
        step_BT = values.step[:, None] + torch.arange(logits.shape[1], device=logits.device)
        noisy = scores + gumbel(values.key, step_BT, logits.shape[-1])
    best, token = noisy.max(dim=-1)
    token = torch.where(best.isfinite(), token, -1)  # the largest of what holds a NaN is NaN
    candidates = None
    if rule.candidates:
        top, tokens = noisy.topk(rule.candidates, dim=-1)
        candidates = top, scores.gather(-1, tokens), tokens
    return Choice(token, scores if rule.scores else None, candidates, logits if rule.logits else None)
