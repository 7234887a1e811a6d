"""One HDF5 file of weights, or one that lies inside another file: understood without the HDF5 library, made with it."""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .... import extras
from ....disk import files, reading
from ....disk.reading import opened
from ....errors import CorruptCheckpointError
from ..tensor_file import DTYPES, TensorFile, TensorInfo, quoted, stamp_of
from .structure import Found, Structure

Attributes = Mapping[str, Mapping[str, str | Sequence[str]]]
"""Path of a group ("" is the root) -> name -> a text or a list of texts."""

BFLOAT16 = ("dtype", "bfloat16")
"""The attribute by which Keras says that two opaque bytes are a number."""

_OPAQUE = "V2"
_OLD_LAYERS = "_layer_checkpoint_dependencies"
_MAX_LIST_BYTES = 64512  # a header has no room for more than 64 KiB in one attribute


class Hdf5File(TensorFile):
    """The checked structure of a file and, by `read`, its tensors, whose names are paths: layers/dense/vars/0."""

    def __init__(self, path: files.PathLike, *, start: int = 0, size: int | None = None) -> None:
        """Check the structure of a file, or of `size` bytes in it from `start` on.

        Raises CheckpointNotFoundError, TruncatedFileError, CorruptCheckpointError, UnsafeFileError,
        LimitExceededError, UnsupportedFeatureError, CheckpointError (with the system's errno).
        """
        self.path, self.metadata = reading.as_path(path), {}
        with opened(self.path) as descriptor:
            self.stamp = stamp_of(descriptor)
            structure = Structure(self.path, descriptor, start, self.stamp[2] - start if size is None else size)
            objects = {found.path: found for found in structure.objects()}
        self.attributes = {name: found.attributes for name, found in objects.items()}
        """Path of a group or tensor, "" for the root -> name -> texts."""
        infos = [_tensor_info(self.path, start, found) for found in objects.values() if found.dataset]
        _check_apart(self.path, infos, [(start + first, start + last) for first, last in structure.taken])
        self.tensors = {info.name: info for info in infos}

    def texts(self, path: str, name: str) -> tuple[str, ...]:
        """An attribute of a group, also where it is split into `name0`, `name1` and so on; empty if it is absent."""
        found = self.attributes.get(path, {})
        if name in found:
            return found[name]
        parts = (f"{name}{number}" for number in range(len(found)))
        return tuple(text for part in parts for text in found.get(part, ()))


def _tensor_info(path: Path, start: int, found: Found) -> TensorInfo:
    dtype, shape, first, last = found.dataset or ("", (), 0, 0)
    if dtype == _OPAQUE and found.attributes.get(BFLOAT16[0]) == BFLOAT16[1:]:
        dtype = "BF16"
    return TensorInfo(found.path, dtype, shape, path, start + first, start + last)


def _check_apart(path: Path, infos: Sequence[TensorInfo], taken: Sequence[tuple[int, int]]) -> None:
    """No two tensors share a byte, and none shares one with the structure."""
    ordered = sorted(infos, key=lambda info: info.start)
    for before, info in itertools.pairwise(ordered):
        if info.start < before.end:
            raise CorruptCheckpointError(
                f"{path}: {quoted(info.name)} overlaps {quoted(before.name)}; copy the file again."
            )
    starts = [info.start for info in ordered]
    for first, last in taken:
        place = bisect.bisect_left(starts, last) - 1
        if place >= 0 and ordered[place].end > first:
            raise CorruptCheckpointError(
                f"{path}: {quoted(ordered[place].name)} overlaps the file's structure; copy it again."
            )


def root_names(path: Path) -> set[str]:
    """What tells formats apart: the names of the root's attributes and of all groups and tensors, as of today.

    Raises what `Hdf5File` raises.
    """
    attributes = Hdf5File(path).attributes
    # an attribute too large for one is split
    return {name.rstrip("0123456789") for name in attributes[""]} | {current_name(name) for name in attributes}


def current_name(name: str) -> str:
    """The path that Keras 3 gives to what Keras 2.13 called otherwise."""
    return "layers" + name.removeprefix(_OLD_LAYERS) if name.startswith(_OLD_LAYERS) else name


# Writing


def create(
    path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], attributes: Attributes | None = None
) -> dict[str, TensorInfo]:
    """Make a file for name -> (dtype, shape), with the attributes of groups; `tensor_file.write` then fills it.

    Raises MissingExtraError, and the OSError of a full disk.
    """
    with _made(path) as file:
        for group, texts in (attributes or {}).items():
            for name, value in texts.items():
                _write_attribute(file.require_group(group or "/"), name, value)
        for name, (code, shape) in specs.items():
            _reserve(file, name, code, shape)
    return dict(Hdf5File(path).tensors)


@contextlib.contextmanager
def _made(path: Path) -> Iterator[Any]:
    h5py = extras.require("h5py", "convert", what=f"{path}: writing HDF5")
    try:
        with h5py.File(path, "w-", libver=("earliest", "latest"), locking="best-effort") as file:
            yield file
    except (OSError, RuntimeError) as cause:  # HDF5's own text, of some hundred characters, the number among them
        told = re.search(r"errno = (\d+)", str(cause))
        code = getattr(cause, "errno", None) or (int(told[1]) if told else errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from cause


def _reserve(file: Any, name: str, code: str, shape: tuple[int, ...]) -> None:
    """A dataset that has its place now and its numbers later."""
    from h5py import h5d, h5p

    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    dtype = np.dtype(_OPAQUE) if code == "BF16" else DTYPES[code]
    dataset = file.create_dataset(name, shape, dtype, dcpl=properties, track_times=False)
    if code == "BF16":
        _write_attribute(dataset, *BFLOAT16)


def _write_attribute(owner: Any, name: str, value: str | Sequence[str]) -> None:
    """A text as Keras 3 writes it, or a list of texts as Keras 2 does: in as many parts as it needs."""
    if isinstance(value, str):
        owner.attrs[name] = value
        return
    items = np.array([text.encode() for text in value])
    count = 1
    while any(part.nbytes > _MAX_LIST_BYTES for part in np.array_split(items, count)):
        count += 1
    for number, part in enumerate(np.array_split(items, count)):
        owner.attrs[name if count == 1 else f"{name}{number}"] = part
