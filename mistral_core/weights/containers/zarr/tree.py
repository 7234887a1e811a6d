"""Orbax directories: a tree of zarr arrays that _METADATA describes, read by tensorstore, without jax.

Chunks that are an array's own bytes are read as the files that they are: without tensorstore in half its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .... import extras
from ....disk import files, limits, reading, strict_json
from ....errors import (
    CorruptCheckpointError,
    LimitExceededError,
    ShapeMismatchError,
    UnexpectedTensorsError,
)
from ...contents import StoredTensor
from ..tensor_file import CODES, DTYPES, MAX_TENSORS, TensorFile, TensorInfo, quoted

METADATA = "_METADATA"
UNFINISHED = ".orbax-checkpoint-tmp"
MAX_METADATA_BYTES = limits.MANIFEST_BYTES
MAX_FILES = limits.FILES

ZARR_NAMES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
"""Dtype code -> what zarr version 2 calls it."""

_OCDBT = "manifest.ocdbt"
_NOTHING = {"None", "Dict", "List", "Tuple", "NamedTuple"}


class Tree(NamedTuple):
    """What _METADATA says."""

    names: list[str]
    """Of the arrays: their paths joined by dots."""
    ocdbt: bool
    """The arrays lie in a database of its own, not in directories."""
    driver: str
    """tensorstore's, for the version of zarr."""
    complete: bool
    """Chunks of nothing but the fill value are stored too: one that is absent is lost."""


def describe(directory: Path) -> Tree:
    """Read _METADATA; raises CheckpointNotFoundError, CorruptCheckpointError, LimitExceededError, UnsafeFileError."""
    path = directory / METADATA
    if any(UNFINISHED in part for part in path.parts):
        raise CorruptCheckpointError(f"{directory}: Orbax never finished writing it; save it again.")
    data = strict_json.read_object(path, error=CorruptCheckpointError, max_bytes=MAX_METADATA_BYTES)
    try:
        entries = [
            (".".join(str(part["key"]) for part in entry["key_metadata"]), entry["value_metadata"]["value_type"])
            for entry in data["tree_metadata"].values()
        ]
    except (KeyError, TypeError, AttributeError) as cause:
        raise CorruptCheckpointError(f"{path} must have tree_metadata, with keys and types; save it again.") from cause
    names = [name for name, kind in entries if kind not in _NOTHING]
    if len(names) > MAX_TENSORS:
        raise LimitExceededError(f"{path}: {len(names)} arrays; at most {MAX_TENSORS} are read.")
    for name in names:
        files.check_bare_name(name, str(path))
    if len(set(names)) < len(names):
        raise CorruptCheckpointError(f"{path}: names an array twice; save it again.")
    ocdbt = (directory / _OCDBT).exists()
    if data.get("use_ocdbt") is True and not ocdbt:
        raise CorruptCheckpointError(
            f"{directory}: {_OCDBT} is not there; the checkpoint was not finished or not copied whole, save it again."
        )
    complete = data.get("store_array_data_equal_to_fill_value") is True
    return Tree(names, ocdbt, "zarr3" if data.get("use_zarr3") is True else "zarr", complete)


def format_of(directory: Path) -> str:
    """`maxtext` or `orbax`, by the names of the arrays."""
    return "maxtext" if any(".token_embedder." in f".{name}." for name in describe(directory).names) else "orbax"


class ZarrTree(TensorFile):
    """The arrays of an Orbax directory whose names are kept; read whole, or layer by layer where they are stacks."""

    def __init__(self, directory: Path, keep: Callable[[str], object] = lambda name: True) -> None:
        self.path, self.metadata = directory, {}
        self.tree = describe(directory)
        self._stamps = _stamps(directory)
        self.stamp = self._stamps[directory / METADATA]
        self._stack: tuple[str, Any] = ("", None)
        futures = {name: self._open(name) for name in self.tree.names if keep(name)}
        self._stores = {name: self._result(name, future) for name, future in futures.items()}
        self.tensors = {name: self._info(name, store) for name, store in self._stores.items()}

    def read(self, name: str, rows: slice | None = None, *, cached: bool = True) -> np.ndarray:
        """A fresh array with the stored bits, or some of its rows.

        Raises CorruptCheckpointError, also if a file changed.
        """
        store = self._stores[name]
        plain = self._plain(name, store.shape, [0] * store.rank)
        array = (
            plain.read(name, rows, cached=cached)
            if plain
            else self._result(name, store[_bounded(rows, store.shape)].read(order="C"))
        )
        self.check_unchanged(by_path=plain is None)
        return array

    def read_layer(self, name: str, axis: int, index: int) -> np.ndarray:
        """One layer of a stack, without that axis; raises what `read` raises."""
        store = self._stores[name]
        shape, key = list(store.shape), [0] * store.rank
        shape[axis], key[axis] = 1, index
        array: np.ndarray
        if (plain := self._plain(name, shape, key)) is not None:
            array = plain.read(name).squeeze(axis)
        else:
            stack = self._stack  # several threads may read
            if stack[0] != name:
                stack = self._stack = name, self._open_stack(name, axis)
            view = stack[1][(*(slice(None),) * axis, index)]
            array = self._result(name, view.read(order="C"))
        self.check_unchanged(by_path=plain is None)
        return array

    @property
    def files(self) -> dict[Path, TensorFile]:
        """Every file of the directory, for `Contents.shards`."""
        return {path: _Part(path, stamp) for path, stamp in self._stamps.items()}

    def check_unchanged(self, *, by_path: bool = False) -> None:
        """Raise CorruptCheckpointError if a file of the directory changed since it was opened.

        What tensorstore read it read `by_path`, which may lead to another directory by now.
        """
        if _stamps(self.path) != self._stamps or (by_path and reading.is_replaced(self.path)):
            raise CorruptCheckpointError(f"{self.path}: changed while it was read; load it again.")

    def _plain(self, name: str, shape: Sequence[int], key: list[int]) -> TensorFile | None:
        """The file of a chunk that is an array's own bytes, as `writing` leaves it; None for any other.

        tensorstore would take twice the memory and several times as long; it tells what is wrong with the others.
        """
        described, code = self.path / name / ".zarray", self.tensors[name].dtype
        if self.tree.ocdbt or described not in self._stamps:
            return None
        # not by tensorstore's spec, which keeps some memory for ever each time it is asked for
        found = strict_json.read_object(described, error=CorruptCheckpointError, max_bytes=MAX_METADATA_BYTES)
        plain = {
            "chunks": list(shape),
            "dtype": ZARR_NAMES.get(code),
            "compressor": None,
            "filters": None,
            "order": "C",
        }
        if not plain.items() <= found.items():
            return None
        path = self.path / name / str(found.get("dimension_separator", ".")).join(map(str, key))
        size = math.prod(shape) * DTYPES[code].itemsize
        if path not in self._stamps or self._stamps[path][2] != size:
            return None
        return _Part(path, self._stamps[path], TensorInfo(name, code, tuple(shape), path, 0, size))

    def _open(self, name: str, cache: int = 0) -> Any:
        """A future of an opened array."""
        base = {"driver": "file", "path": f"{self.path.absolute()}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self.tree.ocdbt else base
        spec = {
            "driver": self.tree.driver,
            "kvstore": store if self.tree.ocdbt else {**base, "path": f"{base['path']}{name}/"},
            "fill_missing_data_reads": not self.tree.complete,
            "context": {"cache_pool": {"total_bytes_limit": cache}},
        }
        with self._typed(name):
            return library().open(spec, open=True, read=True)

    def _open_stack(self, name: str, axis: int) -> Any:
        """A stack whose chunks in memory serve the next layers too, if they hold several."""
        store = self._stores[name]
        chunk = store.chunk_layout.read_chunk.shape
        if chunk[axis] == 1:
            return store
        padded = math.prod(-(-size // part) * part for size, part in zip(store.shape, chunk, strict=True))
        layers = -(-store.shape[axis] // chunk[axis]) * chunk[axis]
        cache = padded // layers * chunk[axis] * store.dtype.numpy_dtype.itemsize
        return self._result(name, self._open(name, cache + (1 << 20)))

    def _info(self, name: str, store: Any) -> TensorInfo:
        code = CODES.get(np.dtype(store.dtype.numpy_dtype), store.dtype.name)
        for layout in (store.chunk_layout.read_chunk.shape, store.chunk_layout.write_chunk.shape):
            if any(part > max(size, 1) for part, size in zip(layout, store.shape, strict=True)):
                raise CorruptCheckpointError(
                    f"{self.path}: the chunks of {quoted(name)} are {list(layout)}, larger than its shape "
                    f"{list(store.shape)}; save it again."
                )
        size = math.prod(store.shape) * DTYPES[code].itemsize if code in DTYPES else 0
        return TensorInfo(name, code, tuple(store.shape), self.path / name, 0, size)

    def _result(self, name: str, future: Any) -> Any:
        with self._typed(name):
            return future.result()

    @contextmanager
    def _typed(self, name: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError, NotImplementedError, OverflowError, KeyError, TypeError) as cause:
            reason = ascii(str(cause).partition(" [")[0])[1:-1][:300]
            raise CorruptCheckpointError(
                f"{self.path}: {quoted(name)} cannot be read ({reason}); copy or download it again."
            ) from cause


class _Part(TensorFile):
    """A file of the directory, and the array that it holds by itself, if it does."""

    def __init__(self, path: Path, stamp: tuple[int, int, int, int], *tensors: TensorInfo) -> None:
        self.path, self.stamp, self.metadata = path, stamp, {}
        self.tensors = {info.name: info for info in tensors}


def library() -> Any:
    """The module tensorstore; raises MissingExtraError."""
    return extras.require("tensorstore", "orbax", what="a checkpoint of Orbax")


def _stamps(directory: Path) -> dict[Path, tuple[int, int, int, int]]:
    """What changes when a file does, of every file; raises UnsafeFileError for anything but files and directories."""
    found = reading.statuses_below(directory, most=MAX_FILES)
    return {path: (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in found.items()}


# To and from the table's tensors


def _bounded(rows: slice | None, shape: Sequence[int]) -> Any:
    """Rows as tensorstore takes them, which knows no index beyond the end."""
    if rows is None:
        return ...
    start, stop, _ = rows.indices(shape[0])
    return slice(start, max(start, stop))


def stored(
    tree: ZarrTree,
    name: str,
    wanted: tuple[int, ...] | None = None,
    *,
    layer: tuple[int, int] | None = None,
    then: Callable[[np.ndarray], np.ndarray] = lambda array: array,
) -> StoredTensor:
    """An array, or of a stack the layer (axis, index); `then` makes the table's tensor of it.

    `wanted` is the shape it must have before it is read; None is for an array that the model has no place for.
    """
    info = tree.tensors[name]
    shape = info.shape if layer is None else (*info.shape[: layer[0]], *info.shape[layer[0] + 1 :])

    def load(rows: slice | None, cached: bool) -> np.ndarray:
        if wanted is None:
            raise UnexpectedTensorsError(f"{tree.path}: the model has no place for {quoted(name)}; check the config.")
        if shape != wanted:
            raise ShapeMismatchError(f"{tree.path}: {quoted(name)} is {shape}, the config says {wanted}.")
        array = then(tree.read(name) if layer is None else tree.read_layer(name, *layer))
        return array if rows is None else array[rows]

    return StoredTensor(name, info.dtype, shape, info.file, layer[1] if layer else 0, load, wanted)


def layers_in(tree: ZarrTree, name: str, axis: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(index, (axis, index)) of the layers of a stack; raises ShapeMismatchError, LimitExceededError."""
    shape = tree.tensors[name].shape
    if len(shape) <= axis:
        raise ShapeMismatchError(f"{tree.path}: {quoted(name)} must be a stack of layers, got {list(shape)}.")
    if shape[axis] > MAX_TENSORS:
        raise LimitExceededError(f"{tree.path}: {quoted(name)} has {shape[axis]} layers; at most {MAX_TENSORS}.")
    for index in range(shape[axis]):
        yield index, (axis, index)
