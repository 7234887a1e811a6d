"""How a token is chosen, as data of driver and backends; its meaning is in `mistral_core.reference.sampling`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from .options import GenerationConfig

NUMBERS = (
    "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
"""The options in the order of `Values.numbers`; the filters among them in the order of their use."""
_OFF = {
    "temperature": (1,), "top_k": (None, 0), "top_p": (None, 1), "min_p": (None, 0), "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0), "eta_cutoff": (None, 0),
}  # fmt: skip
"""Filter -> the values with which it changes nothing."""


class Rule(NamedTuple):
    """What a step does with its logits, and so what it is compiled for."""

    sample: bool = False
    filters: tuple[str, ...] = ()
    candidates: int = 0
    """How many of the best tokens of each row are given to a beam search; 0: none, a token is chosen."""
    scores: bool = False
    """Whether what was chosen from is returned."""
    every: bool = False
    """Whether a token is chosen after each column, not after the last only."""
    logits: bool = False
    """Whether the logits are returned as they are."""
    normalised: bool = False
    """Whether what is chosen from are log-probabilities; where tokens are chosen in NumPy only."""

    def takes_likeliest(self, values: Values) -> bool:
        """Whether tokens are the likeliest ones of the logits as they are, and nothing else is asked for."""
        return self._replace(every=False) == Rule() and values.bias is None and values.seen is None

    @classmethod
    def of(cls, generation: GenerationConfig, *, candidates: int = 0) -> Rule:
        """The rule of a generation's options; without `do_sample` nothing is filtered, as in transformers."""
        sample = bool(generation.do_sample) and generation.temperature != 0
        filters = tuple(n for n in NUMBERS if sample and n in _OFF and getattr(generation, n) not in _OFF[n])
        return cls(sample, filters, candidates, bool(generation.output_scores), logits=bool(generation.output_logits))


class Values(NamedTuple):
    """The numbers a rule is applied with: they change without anything being compiled."""

    numbers: Any
    """[8] float32, in the order of NUMBERS."""
    key: Any
    """[B, 2] uint32: each row's key of the noise."""
    step: Any
    """[B] int32: how many new tokens each row had before the first one chosen."""
    bias: Any = None
    """[B, T, V] float32 or None: what is added to the logits, -inf for what may not come."""
    seen: Any = None
    """[B, T, V] bool or None: what the repetition penalty applies to."""

    def number(self, name: str) -> Any:
        """One of the numbers."""
        return self.numbers[NUMBERS.index(name)]


def numbers(generation: GenerationConfig) -> Array:
    """`Values.numbers` of a generation; where an option is None its filter is not in the rule."""
    return np.array([getattr(generation, name) or 0 for name in NUMBERS], np.float32)
