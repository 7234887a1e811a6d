"""Which format is at a path: told by names and content, never guessed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ...compat import unread
from ...disk import reading
from ...errors import CheckpointNotFoundError, ConversionError, UnsupportedFeatureError
from ..containers import tensor_file
from ..containers.hdf5 import file as hdf5_file
from ..containers.safetensors import SafetensorsFile
from ..containers.shards import weight_map_of
from ..containers.tensor_file import UNSEEN, Seen, TensorFile, quoted
from ..containers.zarr import tree as zarr_tree
from .registry import FORMATS, PICKLES, Row


class FoundFormat(NamedTuple):
    """A format, and what was opened to find it."""

    format: str
    seen: Seen = UNSEEN
    """The files whose headers are understood already."""


def only_format(path: Path, *, one_format: bool = False) -> FoundFormat:
    """The format at a path, `hf` of several unless there should be `one_format`; raises ConversionError."""
    seen: dict[Path, TensorFile] = {}
    found = detect(path, seen)
    if len(found) > 1 and (one_format or found[0] != "hf"):
        raise ConversionError(f"{path}: holds {', '.join(found)}; say which one by format= or --from.")
    return FoundFormat(found[0], seen)


def detect(path: Path, seen: dict[Path, TensorFile] | None = None) -> list[str]:
    """The formats at a path, at least one; raises CheckpointNotFoundError, UnsupportedFeatureError.

    A file is told by its first bytes and the names in it, a directory by the names of its files; where names are
    shared between formats, what is in them decides. The files that are opened for that are added to `seen`.
    """
    seen = {} if seen is None else seen
    path = reading.held(path)
    if not path.is_dir():
        return [_of_index(path) if path.name.endswith(".index.json") else _of_file(path, seen)]
    names = set(reading.names(path))
    found = [_told_apart(path, row, name, seen) for row in FORMATS.values() for name in _present(path, row, names)]
    found = list(dict.fromkeys(found))
    loose = sorted(name for name in names if name.endswith((".gguf", ".keras", ".weights.h5")) and "-of-" not in name)
    if not found and len(loose) > 1:
        raise ConversionError(f"{path}: holds {', '.join(map(quoted, loose))}; give the path of one of them.")
    if not found and loose:
        found = [_of_file(path / loose[0], seen)]
    safe = [name for name in found if name not in PICKLES]
    if not found:
        raise _nothing(path, names)
    return safe or found


def _present(directory: Path, row: Row, names: Collection[str]) -> Iterator[str]:
    for name in row.files:
        if name in names or ("/" in name and (directory / name).exists()):
            yield name


def _told_apart(directory: Path, row: Row, name: str, seen: dict[Path, TensorFile]) -> str:
    """The format of a file whose name several formats use."""
    if row.name == "hf":
        path = directory / name
        found = _of_index(path) if name.endswith(".index.json") else _of_file(path, seen)
        return found if found.endswith("-safetensors") else "hf"  # raw names under this name are a mistake to explain
    if name == "model.weights.h5":
        return _of_hdf5(directory / name)
    if row.name == "orbax":
        return zarr_tree.format_of((directory / name).parent)
    return row.name


def _of_index(path: Path) -> str:
    """The format of an index, by its name or by the names that it maps."""
    for row in FORMATS.values():
        if path.name in row.files and row.name != "hf":
            return row.name
    return _of_names(weight_map_of(path)[0])


def _of_file(path: Path, seen: dict[Path, TensorFile]) -> str:
    """The format of one file, by its first bytes and what they lead to."""
    first = tensor_file.first_bytes(path)
    if first.startswith(b"GGUF"):
        return "gguf"
    if first.startswith(b"\x89HDF\r\n\x1a\n"):
        return _of_hdf5(path)
    if first.startswith(b"PK"):
        return "keras" if path.name.endswith(".keras") else _of_pickle(path)
    if path.name.endswith(".msgpack"):
        return "flax-msgpack"
    if path.name.endswith((".bin", ".pth", ".pt", ".ckpt")):
        return _of_pickle(path)
    seen[path] = SafetensorsFile(path)
    return _of_names(seen[path].tensors)


def _of_pickle(path: Path) -> str:
    return "raw-pth" if path.name.startswith("consolidated") else "hf-bin"


def _of_names(names: Collection[str]) -> str:
    """The format of safetensors, by the names of the tensors."""
    if any(name.endswith(":0") for name in names):
        return "tf-safetensors"
    if any(name.endswith((".kernel", ".embedding")) for name in names):
        return "flax-safetensors"
    if any(name.startswith(("tok_embeddings.", "layers.0.attention.")) for name in names):
        return "raw"
    return "hf"


def _of_hdf5(path: Path) -> str:
    """The format of an HDF5 file, by its groups."""
    names = hdf5_file.root_names(path)
    if "layers/reversible_embedding" in names:
        return "keras-hub"
    return "tf-h5" if "layer_names" in names else "keras"


def _nothing(directory: Path, names: Collection[str]) -> Exception:
    """The error for a directory in which no format is found."""
    if text := unread.advice(names):
        return UnsupportedFeatureError(f"{directory}: {text}.")
    looked_for = ", ".join(row.files[0] for row in FORMATS.values() if row.files)
    return CheckpointNotFoundError(f"{directory}: none of {looked_for} is there; check the path.")
