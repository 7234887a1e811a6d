"""What a format finds in the files of a checkpoint: tensors by the table's names and layout, still on disk."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import MistralConfig
from ..disk import limits
from ..errors import ConfigError, ShapeMismatchError
from ..parameters import Parameter
from ..quantization import Scheme
from ..quantization.matrix import PackedMatrix
from ..quantization.packings import Parts
from . import layouts
from .containers.tensor_file import DTYPES, TensorFile, TensorInfo, quoted
from .layouts import Layout


class Packed(NamedTuple):
    """A matrix as the files have it, packed by a scheme."""

    scheme: Scheme
    parts: Parts
    matrix: Callable[[], PackedMatrix | None]
    """All of it in few bits, in the table's layout; None where it can only be dequantised. Raises what reading does."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts in the files."""
        return sum(info.nbytes for info in self.parts.infos.values())


class StoredTensor(NamedTuple):
    """A tensor as `Contents.read` gives it, and where it lies."""

    name: str
    """The name in the file, for messages."""
    dtype: str
    """A code of `tensor_file.DTYPES`, or what the file says instead."""
    shape: tuple[int, ...]
    """The file's own."""
    file: Path
    start: int
    load: Callable[[slice | None, bool], np.ndarray]
    """(rows without a step or None for all, cached) -> the array in the table's layout."""
    wanted: tuple[int, ...] | None = None
    """The shape that the file should have, where its layout is not the table's."""
    moves: str = ""
    """How the file's layout differs, for reports."""
    order: Callable[[], np.ndarray] | None = None
    """The file's row of each row of the table's layout, where rows are all that moves."""
    loss: str = ""
    """Why the values are not those of the model as it was trained; empty where they are."""
    packed: Packed | None = None
    """What `load` dequantises, where the file holds fewer bits by a scheme."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 0


@dataclass(frozen=True)
class Contents:
    """The checked headers of a checkpoint's files, and its tensors."""

    path: Path
    format: str
    shards: Mapping[Path, TensorFile]
    tensors: Mapping[str, StoredTensor]
    """Canonical name -> tensor; for `hf`, the names of the files, in which a bare model lacks `model.`."""
    read_config: Callable[[], MistralConfig] = field(repr=False)
    texts: Mapping[str, Callable[[], bytes]] = field(default_factory=dict, repr=False)
    """Tokenizer, chat template and generation config by Hugging Face's file names."""
    folder: Path | None = None
    """Where config and manifest lie, if it is not where the weights are."""
    skipped: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Name in the files -> a tensor of another tower of a model whose text part this is; nothing reads it by itself."""

    @property
    def directory(self) -> Path:
        """Where the config and the manifest lie."""
        return self.folder or (self.path if self.path.is_dir() else self.path.parent)

    def name_of(self, path: Path) -> str:
        """The name of one of its files below its directory."""
        return Path(os.path.abspath(path)).relative_to(os.path.abspath(self.directory)).as_posix()

    @functools.cached_property
    def config(self) -> MistralConfig:
        """What the checkpoint says of itself; raises what reading a config raises."""
        return self.read_config()

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files in one mapping."""
        return {key: value for shard in self.shards.values() for key, value in shard.metadata.items()}

    @property
    def losses(self) -> tuple[str, ...]:
        """What the values lost before they came here, each kind once."""
        return tuple(sorted({tensor.loss for tensor in self.tensors.values() if tensor.loss}))

    @property
    def schemes(self) -> tuple[str, ...]:
        """By what its matrices are packed, each scheme once; none where all tensors are floats."""
        return tuple(sorted({tensor.packed.scheme.label for tensor in self.tensors.values() if tensor.packed}))

    def check_floats(self) -> None:
        """Raise ConfigError where matrices that are to be packed are packed already."""
        if self.schemes:
            raise ConfigError(
                f"quantization must be None: {self.path} is packed already ({', '.join(self.schemes)}); leave it out, "
                "or quantize the checkpoint that it was made of."
            )

    def dtype(self, name: str) -> np.dtype:
        """The NumPy dtype of a tensor stored as a kind of float."""
        return DTYPES[self.tensors[name].dtype]

    def packed(self, name: str) -> Packed | None:
        """A matrix as the files have it, or None where they have floats; `read` gives it dequantised."""
        return self.tensors[name].packed

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor lies: its file and the byte where it starts."""
        tensor = self.tensors[name]
        return str(tensor.file), tensor.start

    def read(self, name: str, index: slice | tuple[slice, ...] | None = None, *, cached: bool = True) -> np.ndarray:
        """A tensor in the table's layout, or a part of it; the system keeps no copy of its bytes unless `cached`.

        `index` is a slice for each of the first axes, as frameworks ask for the part of one device. Rows of a file in
        the table's own layout are read and no others; of other layouts the whole tensor is read and cut.
        Raises CorruptCheckpointError if its file changed, DtypeMismatchError if it is no kind of float.
        """
        rows, *others = (index,) if isinstance(index, slice) else index or (None,)
        if rows is not None and rows.step not in (None, 1):
            return self.tensors[name].load(None, cached)[(rows, *others)]
        array = self.tensors[name].load(rows, cached)
        return array[(slice(None), *others)] if others else array

    def keep_open(self) -> None:
        """Keep the files of weights open, unless they are many, so that they can be read when others replace them."""
        if len(self.shards) <= limits.KEPT_FILES:
            for shard in self.shards.values():
                shard.keep_open()

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if a file changed since its header was read."""
        for shard in self.shards.values():
            shard.check_unchanged()


def fits_in_cache(size: int) -> bool:
    """Whether the system may keep a copy of so many bytes that are read: good for the next time, if there is room."""
    return size <= memory() / 2


def memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def stored_as_it_is(shards: Iterable[TensorFile], names: Container[str] | None = None) -> dict[str, StoredTensor]:
    """The tensors of files in the table's own layout, by the names of the files; only those `names` if given."""
    return {
        name: _tensor(shard, info)
        for shard in shards
        for name, info in shard.tensors.items()
        if names is None or name in names
    }


def _tensor(shard: TensorFile, info: TensorInfo) -> StoredTensor:
    def load(rows: slice | None, cached: bool) -> np.ndarray:
        return shard.read(info.name, rows, cached=cached)

    return StoredTensor(info.name, info.dtype, info.shape, info.file, info.start, load)


def stored_in_layout(
    shards: Iterable[TensorFile],
    config: MistralConfig,
    rows: Mapping[str, tuple[str, Parameter]],
    layout_of: Callable[[Parameter], Layout],
    names: Container[str] | None = None,
) -> dict[str, StoredTensor]:
    """The tensors of files in another layout; `rows` is name in the file -> (canonical name, row).

    A name that is no row's stays as it is, for `matching.match` to complain of. Only some `names` if they are given.
    """
    found = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if names is not None and name not in names:
                continue
            if name in rows:
                canonical, row = rows[name]
                found[canonical] = _moved(shard, info, row, config, layout_of(row))
            else:
                found[name] = _tensor(shard, info)
    return found


def _moved(shard: TensorFile, info: TensorInfo, row: Parameter, config: MistralConfig, layout: Layout) -> StoredTensor:
    wanted = layouts.stored_shape(row, config, layout)

    def load(rows: slice | None, cached: bool) -> np.ndarray:
        if info.shape != wanted:
            raise ShapeMismatchError(f"{info.file}: {quoted(info.name)} is {info.shape}, the config says {wanted}.")
        if not layout.moves:
            return shard.read(info.name, rows, cached=cached)
        array = layouts.to_canonical(shard.read(info.name, cached=cached), row, config, layout)
        return array if rows is None else array[rows]

    order = functools.partial(layouts.row_order, row, config, layout) if layout.moves_rows_only else None
    return _tensor(shard, info)._replace(wanted=wanted, load=load, moves=layout.moves, order=order)
