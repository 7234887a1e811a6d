"""mistral_manifest.json: SHA-256 of every file and every tensor, so that a flipped bit is found and named."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import strict_json
from .._version import __version__
from ..errors import (
    CheckpointNotFoundError,
    ChecksumMismatchError,
    CorruptCheckpointError,
    TruncatedFileError,
)
from . import files
from .safetensors_file import SafetensorsFile, digest, quoted

NAME = "mistral_manifest.json"
MODES = ("off", "sizes", "full")
MAX_BYTES = 10 << 20


def describe(directory: Path) -> dict[str, Any]:
    """What the manifest of a directory says; every file directly in it is read back and hashed."""
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file() and entry.name != NAME)
    result: dict[str, Any] = {
        "format": 1,
        "tool": f"mistral-frameworks {__version__}",
        "files": {},
        "tensors": {},
    }
    with ThreadPoolExecutor(1) as second:  # hashing releases the GIL: the file beside its tensors
        for name in names:
            path = directory / name
            whole = second.submit(_file_digest, path)
            if name.endswith(".safetensors"):
                result["tensors"].update(_tensor_entries(path))
            result["files"][name] = {"size": path.stat().st_size, "sha256": whole.result()}
    return result


def write(directory: files.PathLike) -> dict[str, Any]:
    """Describe a directory and write its manifest; returns what was written."""
    description = describe(files.as_path(directory))
    store(files.as_path(directory), description)
    return description


def store(directory: Path, description: dict[str, Any]) -> None:
    """Write a description as the manifest of a directory."""
    files.write_file(directory / NAME, (json.dumps(description, indent=1, sort_keys=True) + "\n").encode())


def verify(directory: files.PathLike, mode: str = "full") -> None:
    """Compare a directory with its manifest.

    `off` does nothing, `sizes` looks at the sizes of weight files if there is a manifest, `full` demands one
    and hashes every file it lists. Raises ChecksumMismatchError naming files and tensors,
    TruncatedFileError, CheckpointNotFoundError, ValueError (an unknown mode).
    """
    directory = files.as_path(directory)
    if mode not in MODES:
        raise ValueError(f"verify: {mode!r}, one of {', '.join(MODES)} was expected.")
    path = directory / NAME
    if mode == "off" or (mode == "sizes" and not path.exists()):
        return
    manifest = strict_json.read_object(path, error=CorruptCheckpointError, max_bytes=MAX_BYTES)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(_is_entry(entry) for entry in listed.values()):
        raise CorruptCheckpointError(f"{path}: a size and a sha256 for each file were expected; save again.")
    for name in listed:
        files.check_bare_name(name, str(path))
    # the size check leaves alone what people edit by hand: configs and tokenizers
    checked = {n: e for n, e in listed.items() if mode == "full" or n.endswith(".safetensors")}
    for name, entry in checked.items():
        _check_size(directory / name, entry["size"])
    if mode == "full":
        changed = [name for name, entry in checked.items() if _file_digest(directory / name) != entry["sha256"]]
        if changed:
            raise ChecksumMismatchError(_differences(directory, changed, manifest.get("tensors")))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: no such file, but {NAME} lists it; copy the whole directory.")
    size = path.stat().st_size
    if size < expected:
        raise TruncatedFileError(f"{path}: {size} bytes, {NAME} says {expected}; copy or download it again.")
    if size > expected:
        raise ChecksumMismatchError(f"{path}: {size} bytes, {NAME} says {expected}; copy or download it again.")


def _differences(directory: Path, changed: list[str], tensors: Any) -> str:
    """A message naming the files and, where their headers can still be read, the tensors that differ."""
    expected = tensors if isinstance(tensors, dict) else {}
    found: dict[str, Any] = {}
    for name in changed:
        if name.endswith(".safetensors"):
            try:
                found.update(_tensor_entries(directory / name))
            except OSError:
                continue
    names = sorted(quoted(name) for name, entry in found.items() if entry != expected.get(name))
    which = f" (tensors {', '.join(names)})" if names else ""
    return f"{directory}: {', '.join(changed)}{which} differ from {NAME}; copy or download them again."


def _tensor_entries(path: Path) -> dict[str, dict[str, Any]]:
    file = SafetensorsFile(path)
    return {
        name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "file": path.name,
            "sha256": digest(file.read(name)),
        }
        for name, info in file.tensors.items()
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
