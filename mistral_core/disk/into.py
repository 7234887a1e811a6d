"""Files written into a directory that is there: its manifest goes on to say what is in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import MistralError
from . import limits, reading
from .files import as_path, os_errors, write_file

MANIFEST = "mistral_manifest.json"


def write_into(directory: reading.PathLike, contents: Mapping[str, bytes]) -> None:
    """Write files, by their names below a directory, each atomically and durably, and note them in its manifest.

    While they are written the manifest does not list them, so that a writer which is killed leaves nothing that
    contradicts it. A directory without a manifest gets none. Raises NoSpaceError or ConversionError.
    """
    root = as_path(directory)
    with os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        manifest = _manifest(root)
        if manifest is not None and set(contents) & set(manifest["files"]):
            kept = {name: entry for name, entry in manifest["files"].items() if name not in contents}
            _store(root, {**manifest, "files": kept})
        for name, data in contents.items():
            write_file(root / name, data)
        if manifest is not None:
            described = {name: _entry(data) for name, data in contents.items() if name != MANIFEST}
            _store(root, {**manifest, "files": {**manifest["files"], **described}})


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _manifest(root: Path) -> dict[str, Any] | None:
    """The manifest, if there is one that can be read; one that cannot is left as it is, for `verify` to tell of."""
    path = root / MANIFEST
    if not path.exists():
        return None
    with contextlib.suppress(MistralError, ValueError, RecursionError):
        found = json.loads(reading.read(path, limit=limits.MANIFEST_BYTES))
        if isinstance(found, dict) and isinstance(found.get("files"), dict):
            return found
    return None


def _store(root: Path, manifest: Mapping[str, Any]) -> None:
    write_file(root / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One writer of this kind at a time."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
