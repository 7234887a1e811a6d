"""The loop of a training: steps, measures, states to go on from, and when it ends; the same for every framework."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import ConfigError, NonFiniteLossError
from ..learning import Examples, Feed, LearningStep
from .learner import Learner, StepOutcome
from .record import BEST, FINAL, LAST, Progress, RunRecord, opened
from .settings import TrainingSettings

Told = Callable[[dict[str, Any]], None]
"""Called with what is written into metrics.jsonl, and with how many steps there are in all."""


class TrainingResult(NamedTuple):
    """How a training ended."""

    steps: int
    """Those that were made, also before it was resumed."""
    best_loss: float | None
    """The lowest validation loss; None where nothing was measured."""
    best_step: int
    ended: str
    """All epochs, no lower validation loss, or stopped: then `resume` goes on."""


class ValidationLoss(NamedTuple):
    """The loss of examples that nothing is learnt from."""

    loss: float
    right: float | None
    """The share of what is counted that is right, where a learner tells it."""


def train(
    learner: Learner,
    feed: Feed,
    directory: str | os.PathLike[str],
    *,
    settings: TrainingSettings,
    validation: Examples | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    made_with: Mapping[str, Any] | None = None,
    told: Told | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Let a learner learn from a feed for `settings.epochs`, and keep a record in a new directory (`record`).

    The weights after the last step are in its `final`, and with `validation` those of the lowest loss in `best`. With
    `resume` a run that was stopped or killed goes on to the bit, with the same model and arguments. `about` is what
    else the run is of, in JSON, which a resumed one must have too; `made_with` is only noted. `stop` is asked after
    every step whether to end for now.

    Raises NonFiniteLossError, with the lines of the examples, for a loss or gradients that are no number; what was kept
    before stays. Raises what `record.opened` raises, and what reading examples does.
    """
    counts = feed.steps_by_epoch(settings.epochs)
    what = {
        "settings": settings.to_dict(),
        "data": {"sha256": feed.examples.lines.sha256, "rows": feed.rows, "accumulate": feed.accumulate},
        "validation": None if validation is None else validation.lines.sha256,
        "about": dict(about or {}),
    }
    with opened(directory, what, made_with=made_with or {}, resume=resume) as record:
        run = _Run(learner, feed, settings, validation, record, sum(counts), _ends(counts), told or (lambda _: None))
        run.restore()
        return run.to_the_end(stop or (lambda: False))


def _ends(counts: list[int]) -> frozenset[int]:
    """The numbers of steps after which an epoch ends."""
    return frozenset(sum(counts[: epoch + 1]) for epoch in range(len(counts)))


class _Run:
    """A training that is going on."""

    def __init__(
        self,
        learner: Learner,
        feed: Feed,
        settings: TrainingSettings,
        validation: Examples | None,
        record: RunRecord,
        total: int,
        ends: frozenset[int],
        told: Told,
    ) -> None:
        self.learner, self.feed, self.settings, self.validation = learner, feed, settings, validation
        self.record, self.total, self.ends, self.told = record, total, ends, told
        self.rates, self.progress, self.kept = settings.rates(total), Progress(), 0

    def restore(self) -> None:
        """Go on where the state in the directory was kept."""
        kept = self.record.kept()
        if kept is not None:
            self.progress, feed, arrays = kept
            self.feed.restore(feed)
            self.learner.restore(arrays, steps=self.progress.steps)
            self.kept = self.progress.steps
        self.record.begin_at(self.progress)

    def to_the_end(self, stop: Callable[[], bool]) -> TrainingResult:
        """All steps that are left."""
        ended = "all epochs"
        for step in self._steps():
            self._learn(step)
            if self.validation is not None and self._is_due(self.settings.evaluate_every):
                self._measure(self.validation)
            if self._has_no_patience():
                ended = "no lower validation loss"
            elif stop() and self.progress.steps < self.total:
                ended = "stopped"
            if ended != "all epochs" or self._is_due(self.settings.save_every or self.settings.evaluate_every):
                self._keep()
            if ended != "all epochs":
                break
        if ended != "stopped":
            self._save(FINAL)
        self.record.draw()
        return TrainingResult(self.progress.steps, self.progress.best_loss, self.progress.best_step, ended)

    def _steps(self) -> Iterator[LearningStep]:
        if self._has_no_patience():
            return iter(())
        return self.feed.steps(epochs=self.settings.epochs)

    def _learn(self, step: LearningStep) -> None:
        number, begun = self.progress.steps, time.perf_counter()
        rate = self.rates(number)
        batches = [batch.arguments() for batch in step.batches]
        outcome = self.learner.step(batches, items=step.num_items_in_batch, rate=rate, number=number)
        if not outcome.is_finite:
            raise NonFiniteLossError(self._what_is_wrong(step, outcome))
        self.progress = self.progress._replace(steps=number + 1)
        tokens = sum(batch.tokens for batch in step.batches)
        seconds = time.perf_counter() - begun
        right = {} if outcome.right is None else {"right": outcome.right / step.num_items_in_batch}
        self._note(
            step=number + 1, epoch=step.epoch, loss=outcome.loss, rate=rate, norm=outcome.norm,
            labels=step.num_items_in_batch, tokens=tokens, seconds=round(seconds, 4), **right,
        )  # fmt: skip

    def _what_is_wrong(self, step: LearningStep, outcome: StepOutcome) -> str:
        bad = [batch for batch, loss in zip(step.batches, outcome.losses, strict=True) if not math.isfinite(loss)]
        lines = sorted({line for batch in bad or step.batches for row in batch.lines for line in row})
        what = f"the loss is {outcome.loss}" if bad else f"the norm of the gradients is {outcome.norm}"
        return (
            f"{self.feed.examples.lines.path}: in step {self.progress.steps + 1} {what}, of the examples in lines "
            f"{', '.join(map(str, lines))}; nothing was learnt from them; {self._what_is_kept()}. Take out what is "
            "wrong, or begin another run with a lower rate."
        )

    def _what_is_kept(self) -> str:
        return f"{self.record.directory / LAST} holds step {self.kept}" if self.kept else "nothing was kept before"

    def _measure(self, examples: Examples) -> None:
        found = validation_loss(self.learner, examples, self.feed)
        if not math.isfinite(found.loss):
            raise NonFiniteLossError(
                f"{examples.lines.path}: after step {self.progress.steps} the validation loss is {found.loss}; "
                f"{self._what_is_kept()}. Begin another run with a lower rate."
            )
        lower = self.progress.best_loss is None or found.loss < self.progress.best_loss
        if lower:
            self.progress = self.progress._replace(best_loss=found.loss, best_step=self.progress.steps, since_best=0)
            self._save(BEST)
        else:
            self.progress = self.progress._replace(since_best=self.progress.since_best + 1)
        right = {} if found.right is None else {"validation_right": found.right}
        self._note(step=self.progress.steps, validation_loss=found.loss, **right)

    def _note(self, **numbers: Any) -> None:
        self.record.add(**numbers)
        self.told({**numbers, "steps": self.total})

    def _is_due(self, every: int | None) -> bool:
        done = self.progress.steps
        return done == self.total or (done in self.ends if every is None else done % every == 0)

    def _has_no_patience(self) -> bool:
        return self.settings.patience is not None and self.progress.since_best >= self.settings.patience

    def _keep(self) -> None:
        self.record.keep(self.progress, self.feed.state(), self.learner.arrays())
        self.kept = self.progress.steps

    def _save(self, name: str) -> None:
        self.learner.save(self.record.directory / name)
        self.feed.examples.tokenizer.save_pretrained(self.record.directory / name)


def validation_loss(learner: Learner, examples: Examples, like: Feed | None = None) -> ValidationLoss:
    """The loss of all examples, once each, in rows like those of a feed. Raises ConfigError where nothing counts."""
    rows, pack = (8, None) if like is None else (like.rows, like.pack)
    total, count, right = 0.0, 0, 0
    tells = True
    for step in Feed(examples, rows=rows, shuffle=False, pack=pack).steps(epochs=1):
        for batch in step.batches:
            measured = learner.measure(batch.arguments())
            total += measured.total
            right += measured.right or 0
            tells = tells and measured.right is not None
        count += step.num_items_in_batch
    if not count:
        raise ConfigError(f"{examples.lines.path} must have something with a label, got nothing; give other examples.")
    return ValidationLoss(total / count, right / count if tells else None)
