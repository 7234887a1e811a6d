"""The learning rate of each step, the same numbers for every framework, which differ in how they count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..plain import is_int, is_number
from ..telling import shown

ScheduleName = Literal["constant", "linear", "cosine"]
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A rise over `warmup` steps, then what `kind` says, down to `floor` of the peak at the last step.

    `schedule(step)` is the rate of the step with this number, from 0: what torch has set before it, and what optax and
    Keras compute from how many steps were made. Steps after the last one have its rate. Raises ConfigError.
    """

    peak: float
    steps: int
    kind: ScheduleName = "cosine"
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"kind must be one of {', '.join(SCHEDULES)}, got {shown(self.kind)}.")
        if not is_number(self.peak) or not math.isfinite(self.peak) or self.peak < 0:
            raise ConfigError(f"peak must be a number from 0 on, got {shown(self.peak)}.")
        if not is_int(self.steps) or self.steps < 1:
            raise ConfigError(f"steps must be an integer from 1 on, got {shown(self.steps)}.")
        if not is_int(self.warmup) or not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"warmup must be an integer from 0 to {self.steps}, got {shown(self.warmup)}.")
        if not is_number(self.floor) or not 0 <= self.floor <= 1:
            raise ConfigError(f"floor must be from 0 to 1, a share of the peak, got {shown(self.floor)}.")

    def __call__(self, step: int) -> float:
        """The rate of a step, from 0; the first of a rise is already above 0, and the last one has the peak."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        left = max(self.steps - 1 - self.warmup, 1)
        done = min(max(step - self.warmup, 0) / left, 1.0)
        share = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.floor + (1 - self.floor) * share)
