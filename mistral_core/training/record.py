"""The directory of a run: what it is of, its numbers step by step, the state to go on from, and the weights.

run.json       what is trained how, which a resumed run must agree with, and the versions that began it
metrics.jsonl  an object for each step, and for each measure of the validation loss
curves.html    the loss, the learning rate and the tokens a second as a page, and, with Pillow, curves.png
last/          weights, moments and the place in the data: after a kill, what a run goes on from to the bit
best/          the weights of the lowest validation loss, as an adapter or a model that `from_pretrained` takes
final/         those of the last step
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..disk import files, limits, reading, strict_json
from ..errors import ConfigError, CorruptCheckpointError, MissingExtraError, OutputBusyError, OutputExistsError
from ..plain import is_int
from ..telling import shown, warn
from ..weights.containers import safetensors, tensor_file
from . import curves

RUN, METRICS, LAST, BEST, FINAL = "run.json", "metrics.jsonl", "last", "best", "final"
STATE, PROGRESS = "learner.safetensors", "progress.json"
TOLD = 6
"""Differences between two runs that an error tells."""


class Progress(NamedTuple):
    """How far a run is."""

    steps: int = 0
    best_loss: float | None = None
    """The lowest validation loss so far."""
    best_step: int = 0
    since_best: int = 0
    """Measures since then."""


class RunRecord:
    """A run's directory while this process alone writes it; made by `opened`."""

    def __init__(self, directory: Path, descriptor: int) -> None:
        self.directory, self._descriptor = directory, descriptor
        self.metrics, self._ends = _lines(directory / METRICS)
        """The objects of metrics.jsonl, and where each one's line ends."""
        self._drawn = 0

    def add(self, **numbers: Any) -> None:
        """Write a line of metrics."""
        line, begin = json.dumps(numbers).encode() + b"\n", self._ends[-1] if self._ends else 0
        with files.os_errors(self.directory / METRICS):
            files.write_at(self._descriptor, line, begin)
        self._ends.append(begin + len(line))
        self.metrics.append(numbers)

    def keep(self, progress: Progress, feed: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Write the state to go on from, in one atomic step; the curves too, where there is a tenth more of them."""
        with files.os_errors(self.directory / METRICS):
            os.fsync(self._descriptor)
        with files.atomic_directory(self.directory / LAST, replaces=("*",)) as temporary:
            header = {name: ("F32", tuple(array.shape)) for name, array in arrays.items()}
            for name, info in safetensors.create(temporary / STATE, header).items():
                tensor_file.write(info, np.ascontiguousarray(arrays[name], np.float32))
            state = {**progress._asdict(), "feed": dict(feed)}
            files.write_file(temporary / PROGRESS, json.dumps(state, indent=1).encode())
        if len(self.metrics) >= 1.1 * self._drawn:
            self.draw()

    def kept(self) -> tuple[Progress, dict[str, Any], dict[str, Array]] | None:
        """The state to go on from; None where there is none. Raises CorruptCheckpointError and its kinds."""
        folder = self.directory / LAST
        if not (folder / PROGRESS).exists():
            return None
        state = strict_json.read_object(folder / PROGRESS, error=CorruptCheckpointError)
        feed = state.pop("feed", None)
        numbers = [state.get(name) for name in ("steps", "best_step", "since_best")]
        if set(state) != set(Progress._fields) or not isinstance(feed, dict) or not all(map(is_int, numbers)):
            raise CorruptCheckpointError(
                f"{folder / PROGRESS} must be what a run wrote, got {shown(state)}; without {folder} it begins again."
            )
        file = safetensors.SafetensorsFile(folder / STATE)
        return Progress(**state), feed, {name: np.array(file.read(name)) for name in file.tensors}

    def begin_at(self, progress: Progress) -> None:
        """Let the metrics end where a run goes on: what is cut off is the end of the file, in one step."""
        kept = sum(line["step"] <= progress.steps for line in self.metrics)
        del self.metrics[kept:], self._ends[kept:]
        with files.os_errors(self.directory / METRICS):
            os.ftruncate(self._descriptor, self._ends[-1] if self._ends else 0)

    def draw(self) -> None:
        """Write the curves as a page and, where Pillow is, as an image."""
        charts, self._drawn = curves.charts(self.metrics), len(self.metrics)
        files.write_file(self.directory / "curves.html", curves.page(charts, self.directory.name).encode())
        with contextlib.suppress(MissingExtraError):
            files.write_file(self.directory / "curves.png", curves.png(charts))


def check_new(directory: str | os.PathLike[str], *, resume: bool) -> None:
    """Raise OutputExistsError where a directory has something in it, and no run in it is resumed."""
    folder = reading.as_path(directory)
    with files.os_errors(folder):
        if not resume and folder.exists() and any(name != ".lock" for name in os.listdir(folder)):
            raise OutputExistsError(
                f"{folder} must be new, and has something in it; take another name, or resume (--resume) the run in it."
            )


@contextlib.contextmanager
def opened(
    directory: str | os.PathLike[str], what: Mapping[str, Any], *, made_with: Mapping[str, Any], resume: bool
) -> Iterator[RunRecord]:
    """The record of a run in a new directory, or, with `resume`, in that of the same run.

    Raises OutputExistsError, OutputBusyError, ConfigError where `what` is of another run, and what writing raises.
    """
    folder = reading.as_path(directory)
    check_new(folder, resume=resume)
    with files.os_errors(folder):
        try:
            with files.locked_file(folder / ".lock", wait=False):
                _check_or_write(folder, what, made_with)
                path = folder / METRICS
                with files.opened_to_write(path, new=not path.exists()) as descriptor:
                    yield RunRecord(folder, descriptor)
        except BlockingIOError as cause:
            raise OutputBusyError(f"{folder}: another process trains into it; wait for it, or stop it.") from cause


def _check_or_write(folder: Path, what: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Write run.json, or raise ConfigError where the one that is there says something else."""
    asked = json.loads(json.dumps(what))
    if not (folder / RUN).exists():
        text = json.dumps({**asked, "made_with": dict(made_with)}, indent=1)
        files.write_file(folder / RUN, text.encode())
        return
    there = strict_json.read_object(folder / RUN, error=ConfigError)
    there.pop("made_with", None)
    told = list(_differences(there, asked))
    if told:
        more = f", and {len(told) - TOLD} more" if len(told) > TOLD else ""
        raise ConfigError(
            f"{folder / RUN}: the run to resume is of something else: {'; '.join(told[:TOLD])}{more}; give "
            "what it began with, or begin another run."
        )


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Each value of nested objects that was another."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name} {shown(then)} then, {shown(now)} now"


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a file of metrics and where each ends; what a kill left of the last one is no line."""
    found: list[dict[str, Any]] = []
    ends: list[int] = []
    for number, line in enumerate(reading.read(path, limit=limits.METRICS_BYTES).splitlines(keepends=True), 1):
        try:
            row = strict_json.parse_object(line, where=f"{path}, line {number}", error=CorruptCheckpointError)
        except CorruptCheckpointError as error:
            warn(f"{error} It is dropped, with all that follows.")
            break
        if not is_int(row.get("step")) or not line.endswith(b"\n"):
            break
        found.append(row)
        ends.append(len(line) + (ends[-1] if ends else 0))
    return found, ends
