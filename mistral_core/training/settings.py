"""How a model learns, as numbers that mean the same in every framework."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..learning.order import SEEDS
from ..learning.schedule import SCHEDULES, Schedule, ScheduleName
from ..plain import is_int, is_number
from ..telling import shown

COUNTS = ("epochs", "evaluate_every", "save_every", "patience")
"""Fields that are a number of something, from 1 on; None where the field may be."""


@dataclass(frozen=True)
class TrainingSettings:
    """The optimizer, its learning rates, and when a run is measured, saved and ended. Raises ConfigError.

    The optimizer is AdamW as `mistral_core.reference.optim` has it, on float32 weights, whatever dtype the model
    computes in. Matrices decay; what has one axis, as the norms, does not.
    """

    rate: float
    """The highest learning rate."""
    epochs: int = 1
    schedule: ScheduleName = "cosine"
    warmup: float = 0.03
    """The share of all steps in which the rate rises."""
    floor: float = 0.0
    """The share of the highest rate that the last step has."""
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0
    """The most that the norm of all gradients together may be; None: any."""
    beta: float = 0.1
    """How far preferences pull: beta of DPO."""
    seed: int = 0
    """Of what is dropped in training; the order of the examples has the feed's."""
    evaluate_every: int | None = None
    """Steps between two measures of the validation loss; None: once an epoch."""
    save_every: int | None = None
    """Steps between two states to go on from; None: as often as it is measured, and once an epoch."""
    patience: int | None = None
    """After so many measures without a lower validation loss training ends; None: never before its last epoch."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, got {shown(self.schedule)}.")
        for name in COUNTS:
            value = getattr(self, name)
            if (value is not None or name == "epochs") and (not is_int(value) or value < 1):
                raise ConfigError(f"{name} must be an integer from 1 on, got {shown(value)}.")
        for name in ("warmup", "floor"):
            _check(name, getattr(self, name), "from 0 to 1", 0 <= _number(getattr(self, name)) <= 1)
        for name in ("b1", "b2"):
            _check(name, getattr(self, name), "from 0 to below 1", 0 <= _number(getattr(self, name)) < 1)
        for name in ("rate", "weight_decay"):
            _check(name, getattr(self, name), "a number from 0 on", 0 <= _number(getattr(self, name)) < math.inf)
        for name in ("eps", "beta", "clip"):
            value = getattr(self, name)
            above = (value is None and name == "clip") or 0 < _number(value) < math.inf
            _check(name, value, "a number above 0", above)
        if not is_int(self.seed) or not 0 <= self.seed < SEEDS:
            raise ConfigError(f"seed must be an integer from 0 to 2^64 - 1, got {shown(self.seed)}.")

    def rates(self, steps: int) -> Schedule:
        """The learning rate of each of so many steps."""
        rising = min(round(self.warmup * steps), steps)
        return Schedule(self.rate, steps, self.schedule, warmup=rising, floor=self.floor)

    def factor(self, norm: float) -> float:
        """What gradients of this common norm are multiplied by, so that it is at most `clip`."""
        return 1.0 if self.clip is None or norm <= self.clip else self.clip / norm

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON value."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _check(name: str, value: Any, wanted: str, is_right: bool) -> None:
    if not is_right:
        raise ConfigError(f"{name} must be {wanted}, got {shown(value)}.")
