"""Writing a checkpoint of any format into an empty directory, read back by the format's own reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import files
from ..errors import (
    CorruptCheckpointError,
    DtypeMismatchError,
    MissingTensorsError,
    ShapeMismatchError,
    TensorMismatchError,
    UnexpectedTensorsError,
    UnsupportedFeatureError,
)
from ..parameters import LM_HEAD, shapes
from ..quantization import storage
from ..quantization.matrix import PackedMatrix
from ..threads import Job, Threads
from . import formats, manifest
from .casting import Loss, between
from .containers.tensor_file import STORED, STORED_CODES, digest, quoted
from .formats.base import Outline, Target
from .matching import EMBEDDING
from .workers import Workers

_SYNC_BYTES = 64 << 20


def write_checkpoint(
    directory: Path,
    format: str,
    outline: Outline,
    tensors: Iterable[tuple[str, np.ndarray | PackedMatrix]],
    *,
    limit: int,
    hashes: bool = True,
    losses: dict[str, Loss] | None = None,
) -> dict[str, Any]:
    """Write a stream of (canonical name, array or packed matrix), in any order; returns what a manifest says of it.

    The outline's `others` come in the stream too, by their own names.
    With `hashes` the format's reader must give back every bit. `losses` is filled with what the format itself loses of
    each tensor. Raises TensorMismatchError and its kinds,
    CorruptCheckpointError, and what the format raises for what it cannot express.
    """
    chosen_format = formats.format_named(format)
    if outline.packed and format != "hf":
        raise UnsupportedFeatureError(f"{format}: holds floats only; write packed matrices as hf, or dequantize them.")
    chosen_format.check(outline)
    targets = chosen_format.create(directory, outline, limit)
    written = _Written(outline, hashes, {} if losses is None else losses)
    with _Syncing(directory) as syncing:
        with Workers(written.largest) as workers:
            for name, tensor in tensors:
                for each, array in written.parts_of(name, tensor):
                    written.take(each, array, targets.get(each), workers)
                    syncing.written(array.nbytes)
                    del array  # before the next one comes
                del tensor
        digests = written.complete()
        syncing.written(_SYNC_BYTES)
        description = manifest.describe(directory, chosen_format.open(directory, None), hashes=hashes)
    for name, expected in digests.items():
        if hashes and description["tensors"].get(name, {}).get("sha256") != expected:
            raise CorruptCheckpointError(f"{directory}: {name} reads back differently; check the disk.")
    return description


class _Syncing:
    """Flushes in the background what is written, so that in the end there is little to wait for."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._bytes = directory, 0
        self._thread = Threads(1)
        self._running: Job | None = None

    def written(self, size: int) -> None:
        """Begin to sync where enough has come since, and nothing is being synced; raises what went wrong before."""
        self._bytes += size
        if self._bytes >= _SYNC_BYTES and (self._running is None or self._running.done()):
            if self._running is not None:
                self._running.result()  # ENOSPC is reported only once
            self._bytes = 0
            self._running = self._thread.submit(files.sync_tree, self._directory)

    def __enter__(self) -> _Syncing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._thread.end(drop=False)
        if kind is None and self._running is not None:
            self._running.result()


class _Written:
    """What has come of an outline's tensors, each at most once."""

    def __init__(self, outline: Outline, hashes: bool, losses: dict[str, Loss]) -> None:
        others = {**outline.parts(), **outline.others}
        floats = {
            name: shape
            for name, shape in shapes(outline.config, outline.architecture).items()
            if name not in outline.packed
        }
        self.outline = outline
        self.shapes = {**floats, **{name: others[name][1] for name in others}}
        self.dtypes = {**outline.dtypes, **{name: others[name][0] for name in others}}
        self.hashes, self.losses = hashes, losses
        self.tied = outline.config.tie_word_embeddings
        self.largest = max(math.prod(shape) * STORED[self.dtypes[name]].itemsize for name, shape in self.shapes.items())
        self.digests: dict[str, str] = {}
        self.unexpected: list[str] = []

    def parts_of(self, name: str, tensor: np.ndarray | PackedMatrix) -> Iterator[tuple[str, np.ndarray]]:
        """The arrays of a tensor by their canonical names: itself, or what a file has of a packed matrix."""
        if not isinstance(tensor, PackedMatrix):
            yield name, np.asarray(tensor)
            return
        announced = self.outline.packed.get(name)
        if storage.arrangement_of(tensor) != announced:
            raise TensorMismatchError(f"save: {quoted(name)} must be packed as announced, {announced}.")
        for part, array in storage.parts_of(tensor, self.outline.dtype).items():
            yield f"{name.removesuffix('weight')}{part}", array

    def take(self, name: str, array: np.ndarray, target: Target | None, workers: Workers) -> None:
        if name in self.digests:
            raise TensorMismatchError(f"save: {quoted(name)} comes twice.")
        if target is not None:
            self._check(name, array)
            self.digests[name] = ""
            workers.submit(array.nbytes, self._write, name, array, target)
        elif name == LM_HEAD and self.tied:
            self.digests[name] = digest(array)
        else:
            self.unexpected.append(quoted(name))

    def _write(self, name: str, array: np.ndarray, target: Target) -> None:
        target.write(array)
        if self.hashes:
            self.digests[name] = self._digest(name, array, target)

    def _digest(self, name: str, array: np.ndarray, target: Target) -> str:
        back = target.comes_back(array)
        if back is not array:
            loss = between(array, back)
            if loss.changed:
                self.losses[name] = loss
        return digest(back)

    def _check(self, name: str, array: np.ndarray) -> None:
        if array.shape != self.shapes[name]:
            raise ShapeMismatchError(f"{quoted(name)}: {array.shape}, the config says {self.shapes[name]}.")
        if STORED_CODES.get(array.dtype) != self.dtypes[name]:
            raise DtypeMismatchError(
                f"{quoted(name)}: {array.dtype}, {self.dtypes[name]} was announced; cast it first."
            )

    def complete(self) -> dict[str, str]:
        """Canonical name -> digest of what was written, once everything has come."""
        missing = sorted(set(self.shapes) - set(self.digests))
        if self.unexpected:
            raise UnexpectedTensorsError(f"save: the class has no place for {', '.join(sorted(self.unexpected))}.")
        if missing:
            raise MissingTensorsError(f"save: the tensors {', '.join(missing)} never came.")
        if self.tied and self.hashes and self.digests.get(LM_HEAD, self.digests[EMBEDDING]) != self.digests[EMBEDDING]:
            raise TensorMismatchError(f"save: tie_word_embeddings is true, but {LM_HEAD} is not the embedding.")
        return {name: value for name, value in self.digests.items() if name in self.shapes}
