"""AdamW and the clipping of gradients in float64: what the frameworks' own optimizers are to compute.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)        t = 1, 2, ...

Adam: arXiv 1412.6980, algorithm 1; decay beside it and not through the gradient: arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from ..arrays import Array

Arrays = Mapping[str, Array]


class AdamW(NamedTuple):
    """The numbers of an optimizer."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay: float = 0.0


class Moments(NamedTuple):
    """What an optimizer remembers, by the names of parameters."""

    first: Arrays
    second: Arrays
    steps: int = 0

    @classmethod
    def zeros(cls, parameters: Arrays) -> Moments:
        """Those before the first step."""
        zeros = {name: np.zeros(array.shape) for name, array in parameters.items()}
        return cls(zeros, dict(zeros))


def adamw_step(
    parameters: Arrays, gradients: Arrays, moments: Moments, *, rate: float, rule: AdamW,
    without_decay: Collection[str] = (),
) -> tuple[dict[str, Array], Moments]:  # fmt: skip
    """The parameters and moments after a step, in float64; parameters without a gradient stay as they are."""
    b1, b2, eps, decay = rule
    t, after, first, second = moments.steps + 1, dict(parameters), dict(moments.first), dict(moments.second)
    for name, gradient in gradients.items():
        g, w = gradient.astype(np.float64), parameters[name].astype(np.float64)
        first[name] = b1 * moments.first[name] + (1 - b1) * g
        second[name] = b2 * moments.second[name] + (1 - b2) * g * g
        change = first[name] / (1 - b1**t) / (np.sqrt(second[name] / (1 - b2**t)) + eps)
        after[name] = w - rate * (change + (0 if name in without_decay else decay) * w)
    return after, Moments(first, second, t)


def global_norm(gradients: Arrays) -> float:
    """The length of all gradients as one vector."""
    return float(np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients.values())))


def clipped(gradients: Arrays, most: float) -> dict[str, Array]:
    """Gradients whose common length is at most so much, their direction kept (arXiv 1211.5063)."""
    norm = global_norm(gradients)
    return {name: gradient * (most / norm if norm > most else 1.0) for name, gradient in gradients.items()}
