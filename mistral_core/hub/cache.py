"""The cache of downloads, in huggingface_hub's layout: models--owner--name/{refs,blobs,snapshots}, shared with it.

A file is published here when it is known to be what was announced, under a name made of its own bytes, and that it was
compared is noted (`verified/`). A file that others put there, or that has no note, is compared the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..disk import files, limits, reading
from ..errors import HubError, MistralError, OfflineError
from .errors import Repository
from .wire import is_commit

_BLOB = re.compile("[0-9a-f]{64}")


def folder(repository: Repository) -> Path:
    """The directory of a repository."""
    from huggingface_hub import constants

    cache = Path(repository.cache_dir or constants.HF_HUB_CACHE).absolute()
    return cache / ("models--" + repository.id.replace("/", "--"))


def snapshot(repository: Repository, commit: str) -> Path:
    """The directory of a commit's files, held open if it is there."""
    return reading.held(folder(repository) / "snapshots" / commit)


def commit_of(repository: Repository) -> str | None:
    """What a branch or tag meant when it was last asked for; raises OfflineError for a note that is not in order."""
    revision = repository.revision or "main"
    if is_commit(revision):
        return revision
    note = folder(repository) / "refs" / revision
    if not _is_ref(revision) or not note.exists():
        return None
    with contextlib.suppress(MistralError, UnicodeError):
        commit = reading.read(note, limit=100).decode().strip()
        if is_commit(commit):
            return commit
    raise OfflineError(
        f"{repository}: offline, and the cache cannot be read ({note.name} names no commit); remove the repository's "
        "directory there and load it once online."
    )


def remember(repository: Repository, commit: str) -> None:
    """Note which commit a branch or tag meant, as huggingface_hub does."""
    revision = repository.revision or "main"
    if revision != commit and _is_ref(revision):
        with contextlib.suppress(MistralError):  # a read-only cache is no reason to fail
            files.write_file(folder(repository) / "refs" / revision, commit.encode())


def _is_ref(revision: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision) is not None and ".." not in revision


def found(repository: Repository, commit: str, name: str) -> Path | None:
    """A file that the cache has; raises HubError where something else has its place."""
    path = snapshot(repository, commit) / name
    if not path.exists():
        return None
    if path.is_dir():
        raise HubError(f"{repository}: in the cache {path} is no file; remove it and load again.")
    return path if path.is_file() else None  # a link to a blob that is gone


def blob(repository: Repository, sha256: str | None) -> Path | None:
    """The file with these bytes, if the cache has it from another commit."""
    path = folder(repository) / "blobs" / str(sha256)
    return path if sha256 and path.is_file() and not path.is_symlink() else None


def expected(path: Path) -> str | None:
    """The SHA-256 that the name of a file's blob says, for one that nobody announces."""
    name = os.path.basename(os.path.realpath(path))
    return name if _BLOB.fullmatch(name) else None


def is_verified(repository: Repository, path: Path) -> bool:
    """Whether it is noted that this very file was compared."""
    note = _note(repository, path)
    with contextlib.suppress(MistralError):
        return note.exists() and reading.read(note, limit=100) == _identity(path)
    return False


def note_verified(repository: Repository, path: Path) -> None:
    """Note that a file was compared with what was announced."""
    with contextlib.suppress(MistralError):  # a cache that cannot be written: it is compared each time
        files.write_file(_note(repository, path), _identity(path))


def _identity(path: Path) -> bytes:
    status = reading.status_of(path)
    return f"{status.st_ino} {status.st_size}".encode()


def _note(repository: Repository, path: Path) -> Path:
    home = folder(repository)
    name = os.path.relpath(os.path.realpath(path), os.path.realpath(home)).replace(os.sep, "--")
    return home / "verified" / _short(name)


def _short(name: str) -> str:
    """A name that is a file's, whatever its length."""
    return name if len(name) <= 100 else f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def arriving(repository: Repository, commit: str, name: str) -> Iterator[tuple[Path, int]]:
    """A file of ours into which a download goes, and its descriptor, while no other process writes it.

    What is left of a download whose process died is in it.
    """
    directory = folder(repository) / "arriving" / commit
    path = directory / _short(name.replace("/", "--"))
    with files.locked_file(path) as descriptor:
        yield path, descriptor


def sweep(repository: Repository, commit: str) -> None:
    """Remove the directories of downloads, where nothing is left in them."""
    with contextlib.suppress(OSError):
        (folder(repository) / "arriving" / commit).rmdir()
        (folder(repository) / "arriving").rmdir()


def publish(repository: Repository, commit: str, name: str, path: Path, sha256: str | None) -> Path:
    """Give a compared file its place: a blob of its own name, and a link to it in the snapshot."""
    from huggingface_hub import file_download

    home = folder(repository)
    place = home / "snapshots" / commit / name
    os.makedirs(place.parent, exist_ok=True)
    if not file_download.are_symlinks_supported(home.parent):
        os.replace(path, place)
    else:
        target = home / "blobs" / (sha256 or _git_name(path))
        os.makedirs(target.parent, exist_ok=True)
        if path != target:
            os.replace(path, target)
        link = place.with_name(f".{secrets.token_hex(8)}")
        link.symlink_to(os.path.relpath(target, place.parent))
        try:
            os.replace(link, place)
        except BaseException:
            link.unlink(missing_ok=True)
            raise
    note_verified(repository, place)
    return place


def _git_name(path: Path) -> str:
    """Git's name of a small file, by which huggingface_hub knows it too."""
    data = reading.read(path, limit=limits.UNANNOUNCED_BYTES)
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
