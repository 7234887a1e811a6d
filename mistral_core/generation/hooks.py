"""A caller's own functions in the decode loop: `logits_processor`, `stopping_criteria`, `prefix_allowed_tokens_fn`.

They get the framework's arrays on the model's device, as transformers gives them: the ids of every row, padding
included, and its scores. A function may remember what it was asked, so nothing is guessed where there is one. Tokens
are then chosen in NumPy, by the specification itself, as where an option is in force that no backend's step has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..arrays import Array
from ..errors import GenerationConfigError
from ..reference import sampling
from .history import shaped
from .options import GenerationConfig
from .sampling import Rule, Values


class LogitsProcessor:
    """A function of ids [B, T] and scores [B, V] that returns scores; a subclass defines `__call__`."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores that the next tokens are chosen from."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__.")


class LogitsProcessorList(list[Any]):
    """Functions of ids and scores, each given what the one before returned."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores that the last of them returns."""
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteria:
    """A function of ids [B, T] and scores that says whether the rows end; a subclass defines `__call__`."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """One bool, or one for each row."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__.")


class StoppingCriteriaList(list[Any]):
    """Functions that say whether the rows end: where one says so, they do."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """One bool, or one for each row."""
        ended: Any = False
        for criterion in self:
            ended = criterion(input_ids, scores, **kwargs) | ended
        return ended


class Border(Protocol):
    """The border between NumPy and a framework."""

    def array(self, x: Array) -> Any:
        """An array of the framework, on the model's device."""

    def numpy(self, x: Any) -> Array:
        """What the framework, or Python, calls an array, in NumPy."""


class Hooks(NamedTuple):
    """The functions of a call, in the order in which they are asked."""

    processors: tuple[Callable[..., Any], ...] = ()
    """(ids [B, T], scores [B, V]) -> scores."""
    criteria: tuple[Callable[..., Any], ...] = ()
    """(ids [B, T], scores of all steps or None) -> whether the rows end, one bool or [B]."""
    allowed: Callable[[int, Any], Any] | None = None
    """(row of the batch, ids [T]) -> the ids that may come."""

    @classmethod
    def of(cls, options: dict[str, Any]) -> Hooks:
        """Those among the options of a call, which are taken out; raises GenerationConfigError."""
        allowed = options.pop("prefix_allowed_tokens_fn", None)
        if allowed is not None and not callable(allowed):
            raise GenerationConfigError(f"prefix_allowed_tokens_fn must be a function, got {type(allowed).__name__}.")
        processors, criteria = (options.pop(name, None) for name in ("logits_processor", "stopping_criteria"))
        return cls(_functions("logits_processor", processors), _functions("stopping_criteria", criteria), allowed)

    @property
    def shape(self) -> bool:
        """Whether one of them changes scores."""
        return bool(self.processors) or self.allowed is not None

    def processed(self, border: Border, ids_BT: Array, scores_BV: Array, *, beams: int) -> Array:
        """What they make of the scores, float32."""
        scores_BV = np.array(scores_BV, np.float32)  # a copy, which a function may write to
        if self.allowed is not None:
            scores_BV = self._constrained(border, ids_BT, scores_BV, beams)
        if not self.processors:
            return scores_BV
        ids, scores = border.array(ids_BT), border.array(scores_BV)
        for processor in self.processors:
            scores = processor(ids, scores)
        found = border.numpy(scores)
        if found.shape != scores_BV.shape:
            raise GenerationConfigError(
                f"logits_processor must return scores of the shape {scores_BV.shape}, got {found.shape}."
            )
        return found.astype(np.float32)

    def _constrained(self, border: Border, ids_BT: Array, scores_BV: Array, beams: int) -> Array:
        assert self.allowed is not None
        constrained = np.full_like(scores_BV, -np.inf)
        for row, ids in enumerate(ids_BT):
            allowed = border.numpy(self.allowed(row // beams, border.array(ids))).reshape(-1).astype(np.int64)
            size = scores_BV.shape[1]
            if not len(allowed) or allowed.min() < 0 or allowed.max() >= size:
                raise GenerationConfigError(
                    f"prefix_allowed_tokens_fn must give at least one id from 0 to {size - 1} for row {row}, "
                    f"got {allowed.tolist()[:8]}."
                )
            constrained[row, allowed] = scores_BV[row, allowed]
        return constrained

    def stopped(self, border: Border, ids_BT: Array, scores: tuple[Any, ...] | None) -> Array:
        """[B]: whether one of them ends a row."""
        ended = np.zeros(len(ids_BT), bool)
        ids = border.array(ids_BT) if self.criteria else None
        for criterion in self.criteria:
            found = border.numpy(criterion(ids, scores))
            if found.size not in (1, len(ended)):
                raise GenerationConfigError(
                    f"stopping_criteria must give one answer, or one for each of {len(ended)} rows, got {found.size}."
                )
            ended |= found.reshape(-1).astype(bool)
        return ended


def with_length(processors: Any) -> tuple[Callable[..., Any], ...]:
    """Processors that may be those of transformers' Flax models, which take the length of the ids as a third argument.

    Each is given what it takes; raises GenerationConfigError.
    """
    return tuple(map(_given_length, _functions("logits_processor", processors)))


def _given_length(processor: Callable[..., Any]) -> Callable[..., Any]:
    try:
        inspect.signature(processor).bind(None, None, None)
    except (TypeError, ValueError):  # it takes two, or says nothing of what it takes
        return processor
    return lambda ids_BT, scores_BV: processor(ids_BT, scores_BV, ids_BT.shape[1])


def _functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    functions = tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)
    for function in functions:
        if not callable(function):
            raise GenerationConfigError(f"{name} must be a list of functions, got {type(function).__name__}.")
    return functions


class Chooser:
    """How the tokens of a call are chosen: by the engine's own step, or, where a function or an option asks, here."""

    def __init__(self, border: Border, generation: GenerationConfig, hooks: Hooks, rule: Rule) -> None:
        self.border, self.generation, self.hooks, self.rule = border, generation, hooks, rule
        self.is_here = hooks.shape or generation.is_chosen_by_core

    def asked(self, *, every: bool = False) -> Rule:
        """The rule of an engine's step."""
        return Rule(every=every, logits=True) if self.is_here else self.rule._replace(every=every)

    def __call__(self, logits_BTV: Array, values: Values, ids_BT: Array) -> sampling.Choice:
        """What is chosen from the logits of an engine's step; the ids are those so far, needed for functions only."""
        scores = sampling.processed(logits_BTV, self.rule, values)
        made_BT = values.step[:, None] + np.arange(scores.shape[1])
        scores = shaped(scores, made_BT, self.generation)
        if self.hooks.shape:
            scores = self.hooks.processed(self.border, ids_BT, scores[:, 0], beams=self.generation.num_beams)[:, None]
        rule = self.rule._replace(normalised=self.generation.renormalize_logits)
        return sampling.chosen(scores.astype(np.float64), rule, values)
