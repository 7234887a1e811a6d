"""What packing costs: how far a packed model's predictions on a text are from those of the same model in floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..errors import EmptyInputError
from ..parameters import BODY, LM_HEAD
from ..reference import ops
from . import forward
from .matrix import PackedMatrix

PREDICTIONS = 256
"""Tokens whose probabilities are computed at once."""

Progress = Callable[[int, int], None]
"""Called with layers that are done, and how many there are."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """A packed model's predictions of a text beside those in floats, each a mean over all tokens but the first ones."""

    tokens: int
    """That were predicted."""
    loss: float
    """In floats, nats per token."""
    packed_loss: float
    kl: float
    """KL(float || packed), nats per token: 0 where the predictions are the same."""
    changed: float
    """Share of the tokens at which another one is the likeliest."""

    @property
    def perplexity(self) -> float:
        """exp(loss) in floats."""
        return math.exp(self.loss)

    @property
    def packed_perplexity(self) -> float:
        """exp(loss) packed."""
        return math.exp(self.packed_loss)

    def to_dict(self) -> dict[str, float]:
        """All numbers by name."""
        numbers = dataclasses.asdict(self)
        return numbers | {"perplexity": self.perplexity, "packed_perplexity": self.packed_perplexity}

    def table(self) -> str:
        """Lines for people."""
        lines = [
            f"{name:16}{own:10.{digits}f}{other:10.{digits}f}   {other - own:+.{digits}f}{unit}"
            for name, own, other, digits, unit in (
                ("loss", self.loss, self.packed_loss, 4, " nats per token"),
                ("perplexity", self.perplexity, self.packed_perplexity, 3, ""),
            )
        ]
        return "\n".join([
            f"{'':16}{'floats':>10}{'packed':>10}   {self.tokens} tokens predicted",
            *lines,
            f"{'KL divergence':16}{'':10}{self.kl:10.4f}   nats per token; 0 is the same",
            f"{'likeliest token':16}{'':10}{self.changed:10.1%}   changed",
        ])  # fmt: skip


def quality(
    config: MistralConfig,
    parameters: Mapping[str, Array],
    packed: Mapping[str, Array | PackedMatrix],
    ids: Array,
    *,
    progress: Progress | None = None,
) -> Quality:
    """How well a language model predicts texts [N, T] without padding, in floats and with what is in `packed`.

    `parameters` are arrays by canonical name, each read when it is needed; `packed` are those that take the place of
    some, or of all: a mapping of another checkpoint's. A layer's weights are in memory at a time, and two arrays of
    states [N, T, D] in float32. Sums are in float64. Raises TokenIdError, InputError, EmptyInputError.
    """
    ids = forward.checked_ids(config, ids)
    if ids.shape[1] < 2:
        raise EmptyInputError(
            f"ids must hold two tokens a text at least, of which one is predicted, got {ids.shape[1]}."
        )
    step, batches = forward.step_of(config, ids.shape[1]), forward.batches_of(*ids.shape)

    def both(name: str) -> tuple[Array, Array]:
        own = forward.floats(parameters, name)
        return own, forward.floats(packed, name) if name in packed else own

    own = forward.embedded(parameters, ids)
    states = [own, forward.embedded(packed, ids) if forward.EMBEDDING in packed else own.copy()]
    for layer in range(config.num_hidden_layers):
        names = [row.name.format(layer) for row in BODY if "{}" in row.name]
        weights = {name: forward.floats(parameters, name) for name in names}
        for x_NTD in states:
            for part in batches:
                x_NTD[part] = forward.decoder_layer(
                    config, forward.weights_of(weights, layer), layer, x_NTD[part], step
                )
            weights |= {name: forward.floats(packed, name) for name in names if name in packed}
        if progress is not None:
            progress(layer + 1, config.num_hidden_layers)
    rows = [
        ops.rms_norm(x_NTD, norm, config.rms_norm_eps)[:, :-1].reshape(-1, config.hidden_size)
        for x_NTD, norm in zip(states, both("model.norm.weight"), strict=True)
    ]
    heads = both(forward.EMBEDDING if config.tie_word_embeddings else LM_HEAD)
    return _compared(rows, heads, ids[:, 1:].reshape(-1))


def _compared(states: Sequence[Array], heads: Sequence[Array], labels: Array) -> Quality:
    """Of the states [tokens, D] and the heads [V, D] of two models."""
    sums = np.zeros(4)
    for start in range(0, len(labels), PREDICTIONS):
        part = slice(start, start + PREDICTIONS)
        own, other = (_log_probability(ops.linear(x[part], head)) for x, head in zip(states, heads, strict=True))
        wanted = labels[part, None]
        divergence = np.exp(own) * (own - other)
        sums += [
            -np.take_along_axis(own, wanted, -1).sum(),
            -np.take_along_axis(other, wanted, -1).sum(),
            divergence.sum(),
            (own.argmax(-1) != other.argmax(-1)).sum(),
        ]
    return Quality(len(labels), *(float(each) for each in sums / len(labels)))


def _log_probability(logits: Array) -> Array:
    """log softmax in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits
