"""What a training asks of a framework: a model that learns, step by step, and the numbers it goes on from."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..arrays import Array
from ..errors import ConfigError, MissingTensorsError, ShapeMismatchError, UnsupportedFeatureError
from ..loss_chunks import chunk_rows
from ..telling import shown

MOMENTS = ("weights", "first", "second")
"""What is kept of each weight that learns, all float32: itself, and Adam's means of gradients and of their squares."""
OBJECTIVES = ("labels", "preferences")
"""What is learnt: to say what is labelled, or to say the chosen answer rather than the rejected one."""


class StepOutcome(NamedTuple):
    """What came of a step."""

    losses: tuple[float, ...]
    """Of each batch, divided by what the whole step counts: they add up to the step's."""
    norm: float
    """Of all gradients together, before they are clipped."""
    right: int | None = None
    """Of preferences: the pairs whose chosen answer is the likelier one, by the model's change."""

    @property
    def loss(self) -> float:
        """Of the step."""
        return math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else math.nan

    @property
    def is_finite(self) -> bool:
        """Whether the step has moved the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Measure(NamedTuple):
    """The loss of a batch that nothing is learnt from."""

    total: float
    """The sum of the losses of what is counted: labels that are not -100, or pairs."""
    right: int | None
    """How many of them are right: classes that are the likeliest, pairs whose chosen answer is; None: not told."""


class Learner(Protocol):
    """A model of one framework, and an optimizer of those of its weights that learn."""

    def step(self, batches: Sequence[Mapping[str, Array]], *, items: int, rate: float, number: int) -> StepOutcome:
        """Learn from the batches of step `number`, from 0, as from one, at this rate; `items` are all that counts.

        Where a loss or the norm of the gradients is no finite number, nothing is moved.
        """

    def measure(self, batch: Mapping[str, Array]) -> Measure:
        """The loss of a batch, and nothing learnt."""

    def arrays(self) -> dict[str, Array]:
        """Each of MOMENTS of each weight that learns, "weights.model.norm.weight" and so on, float32."""

    def restore(self, arrays: Mapping[str, Array], *, steps: int) -> None:
        """Go on after so many steps from what `arrays` gave; raises what `check_arrays` raises."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter that learns in peft's files, or the whole model."""


def check_arrays(arrays: Mapping[str, Array], weights: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MissingTensorsError, ShapeMismatchError unless arrays are MOMENTS of weights of these names and shapes."""
    wanted = {f"{moment}.{name}": tuple(shape) for name, shape in weights.items() for moment in MOMENTS}
    missing, others = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
    if missing or others:
        raise MissingTensorsError(
            f"state: {len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}), and {len(others)} are of "
            f"nothing that learns ({', '.join(others[:3]) or 'none'}); go on with the model and adapter it is of."
        )
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ShapeMismatchError(
                f"state: {name} must be {list(shape)}, got {list(arrays[name].shape)}; go on with "
                "the model and adapter that it is of."
            )


def check_learns(
    model: Any, names: Collection[str], adapters: Collection[str], *, dtype: str, packed: bool, objective: str
) -> None:
    """Raise ConfigError, UnsupportedFeatureError where a model cannot learn as it is asked to."""
    kind = type(model).__name__
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {shown(objective)}.")
    if dtype not in ("float32", "bfloat16"):
        raise UnsupportedFeatureError(
            f"{kind}: in {dtype} small gradients are lost; load it in bfloat16, whose weights learn in float32, or in "
            "float32."
        )
    if packed and not adapters:
        raise UnsupportedFeatureError(
            f"{kind}: packed matrices do not learn; add an adapter (add_adapter, --lora), or load it with "
            "quantization='dequantize'."
        )
    if len(adapters) > 1:
        raise ConfigError(f"{kind}: one adapter learns at a time, got {', '.join(adapters)}; set_adapter chooses.")
    if not names:
        raise ConfigError(f"{kind} must have weights that learn, got none; add an adapter, or set it active.")
    if objective == "preferences" and (model.architecture != "MistralForCausalLM" or not adapters):
        raise UnsupportedFeatureError(
            f"{kind}: preferences are of a language model with an adapter, without which it is what it is compared "
            "with; add one (add_adapter, --lora)."
        )


def rows_of_logits(model: Any, batch: Mapping[str, Array]) -> dict[str, int]:
    """How many tokens' logits are there at a time where nothing is learnt, as an option of a language model's call."""
    if model.architecture != "MistralForCausalLM":
        return {}
    return {"loss_chunk": chunk_rows(None, math.prod(batch["labels"].shape), model.config.vocab_size, training=True)}
