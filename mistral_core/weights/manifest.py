"""mistral_manifest.json: SHA-256 of every file and every tensor, so that a flipped bit is found and named."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..disk import files, reading, strict_json
from ..disk.into import MANIFEST
from ..errors import (
    CheckpointNotFoundError,
    ChecksumMismatchError,
    CorruptCheckpointError,
    MistralError,
    TruncatedFileError,
)
from ..threads import Threads
from .carried import MAX_MANIFEST_BYTES as MAX_BYTES
from .containers.tensor_file import TensorInfo, digest, quoted
from .contents import Contents, StoredTensor
from .matching import canonical_names
from .opening import Checkpoint
from .workers import Workers

MODES = ("off", "sizes", "full")
EDITED = (".json", ".jinja", ".md", ".txt", "LICENSE", "NOTICE")


def describe(directory: Path, checkpoint: Contents | None = None, *, hashes: bool = True) -> dict[str, Any]:
    """What the manifest of a directory says; every file in it is read back and hashed, and every tensor.

    Tensors are hashed by the table's names and in its layout, so that the same tensor has the same digest in every
    format. Without `hashes` only names and sizes are told, and nothing is read.
    """
    directory = reading.held(directory)
    checkpoint = checkpoint or Checkpoint.open(directory)
    result: dict[str, Any] = {
        "format": 1,
        "tool": f"mistral-frameworks {__version__}",
        "files": {},
        "tensors": {},
    }
    with Threads(1) as second:  # hashing releases the GIL: the files beside their tensors
        sizes = {name: reading.size_of(path) for name, path in _files(directory).items()}
        wholes = {name: second.submit(file_digest, directory / name) for name in sizes if hashes}
        result["tensors"] = _tensor_entries(checkpoint, hashes=hashes)
        for name, size in sizes.items():
            result["files"][name] = {"size": size, "sha256": wholes[name].result() if hashes else None}
    return result


def _files(directory: Path) -> dict[str, Path]:
    """Every file below a directory, but the manifest."""
    return {name: path for name, path in reading.files_below(directory).items() if name != MANIFEST}


def write(directory: files.PathLike) -> dict[str, Any]:
    """Describe a directory and write its manifest; returns what was written."""
    description = describe(files.as_path(directory))
    store(files.as_path(directory), description)
    return description


def store(directory: Path, description: dict[str, Any]) -> None:
    """Write a description as the manifest of a directory."""
    files.write_file(directory / MANIFEST, (json.dumps(description, indent=1, sort_keys=True) + "\n").encode())


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a directory; raises CheckpointNotFoundError, CorruptCheckpointError, UnsafeFileError."""
    path = directory / MANIFEST
    manifest = strict_json.read_object(path, error=CorruptCheckpointError, max_bytes=MAX_BYTES)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(_is_entry(entry) for entry in listed.values()):
        raise CorruptCheckpointError(f"{path} must have a size and a sha256 for each file; save again.")
    for name in listed:
        for part in name.split("/"):
            files.check_bare_name(part, str(path))
    return manifest


def verify(directory: files.PathLike, mode: str = "full") -> None:
    """Compare a directory with its manifest.

    `off` does nothing, `sizes` looks at the sizes of weight files if there is a manifest, `full` demands one
    and hashes every file it lists. Raises ChecksumMismatchError naming files and tensors,
    TruncatedFileError, CheckpointNotFoundError, ValueError (an unknown mode).
    """
    directory = reading.held(files.as_path(directory))
    if mode not in MODES:
        raise ValueError(f"verify must be one of {', '.join(MODES)}, got {mode!r}.")
    path = directory / MANIFEST
    if mode == "off" or (mode == "sizes" and not path.exists()):
        return
    manifest = read(directory)
    # the size check leaves alone what people edit by hand: configs and tokenizers
    checked = {n: e for n, e in manifest["files"].items() if mode == "full" or not n.endswith(EDITED)}
    for name, entry in checked.items():
        _check_size(directory / name, entry["size"])
    if mode == "full":
        unknown = [name for name, entry in checked.items() if entry["sha256"] is None]
        if unknown:
            raise CorruptCheckpointError(f"{path}: was written without hashes; convert again with verification.")
        changed = [name for name, entry in checked.items() if file_digest(directory / name) != entry["sha256"]]
        if changed:
            raise ChecksumMismatchError(_differences(directory, changed, manifest.get("tensors")))


def _is_entry(entry: Any) -> bool:
    typed = isinstance(entry, dict) and {"size", "sha256"} <= set(entry)
    return typed and type(entry["size"]) is int and isinstance(entry["sha256"], str | None)


def _check_size(path: Path, expected: int) -> None:
    if not path.exists():
        raise CheckpointNotFoundError(f"{path}: no such file, but {MANIFEST} lists it; copy the whole directory.")
    size = reading.size_of(path)
    if size < expected:
        raise TruncatedFileError(f"{path}: {size} bytes, {MANIFEST} says {expected}; copy or download it again.")
    if size > expected:
        raise ChecksumMismatchError(f"{path}: {size} bytes, {MANIFEST} says {expected}; copy or download it again.")


def _differences(directory: Path, changed: list[str], tensors: Any) -> str:
    """A message naming the files and, where their headers can still be read, the tensors that differ."""
    expected = tensors if isinstance(tensors, dict) else {}
    try:
        found = _tensor_entries(Checkpoint.open(directory))
    except (MistralError, OSError):
        found = {}
    names = sorted(quoted(name) for name, entry in found.items() if entry != expected.get(name))
    which = f" (tensors {', '.join(names)})" if names else ""
    edited = (
        ""
        if not all(name.endswith(EDITED) for name in changed)
        else (
            " If another program or you changed them on purpose, write the manifest anew: "
            "mistral_core.weights.manifest.write(directory)."
        )
    )
    return f"{directory}: {', '.join(changed)}{which} differ from {MANIFEST}; copy or download them again.{edited}"


def _tensor_entries(checkpoint: Contents, *, hashes: bool = True) -> dict[str, dict[str, Any]]:
    """Canonical name -> entry, in the order of the files, then those of other towers by their own names.

    A packed matrix has an entry for each of its parts.
    """
    names = sorted(canonical_names(checkpoint.tensors).items(), key=lambda pair: checkpoint.place(pair[1]))
    entries: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    reads: dict[str, Callable[[], np.ndarray]] = {}
    for name, source in names:
        tensor = checkpoint.tensors[source]
        if tensor.packed is None:
            entries[name], sizes[name] = _entry(checkpoint, tensor), tensor.nbytes
            reads[name] = functools.partial(checkpoint.read, source)
            continue
        for part, info in tensor.packed.parts.infos.items():  # as they are stored: floats would be no one's bits
            of_part = f"{name.removesuffix('weight')}{part}"
            entries[of_part], sizes[of_part] = _entry(checkpoint, info), info.nbytes
            reads[of_part] = functools.partial(tensor.packed.parts.read, part)

    def add_digest(name: str, read: Callable[[], np.ndarray]) -> None:
        entries[name]["sha256"] = digest(read())

    for name, tensor in checkpoint.skipped.items():
        shard = checkpoint.shards[tensor.file]
        entries[name] = _entry(checkpoint, tensor)
        sizes[name], reads[name] = shard.tensors[name].nbytes, functools.partial(shard.read_bytes, name)
    if hashes:
        with Workers(max(sizes.values(), default=0)) as workers:
            for name, read in reads.items():
                workers.submit(sizes[name], add_digest, name, read)
    return entries


def _entry(checkpoint: Contents, tensor: StoredTensor | TensorInfo) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": checkpoint.name_of(tensor.file),
        "sha256": None,
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file; raises what `reading.opened` raises."""
    return reading.sha256(path)
