"""The model hub: an id becomes a local directory of one commit; a local path stays what it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ..compat import unread
from ..disk import files as safe_files
from ..disk import reading
from ..disk.names import TEMPLATES, is_template
from ..errors import (
    CheckpointNotFoundError,
    DownloadCorruptError,
    FileNotOnHubError,
    HubError,
    HubTimeoutError,
    MistralError,
    OfflineError,
    UnsafeFileError,
)
from ..telling import warn
from ..threads import Threads
from . import cache, wire
from .errors import Repository, our_error
from .wire import Announced

ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")

_DOWNLOADS_AT_ONCE = 4
_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pth", ".pt", ".h5", ".keras", ".msgpack", ".model", ".npz")


class WantedFiles(Protocol):
    """Which files of a repository are fetched: first small ones, then those that the small ones lead to."""

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of which a copy in the cache has at least one."""
        ...

    @property
    def told(self) -> tuple[str, ...]:
        """Names that a message tells of, where none is there."""
        ...

    @property
    def rest_is(self) -> str:
        """What `rest` is, for a message."""
        ...

    def first(self, names: Collection[str], where: str) -> list[str]:
        """Of all names, those that are fetched first."""
        ...

    def rest(self, names: Collection[str], where: str, snapshot: Path) -> list[str]:
        """Those that are fetched next; the first ones are in `snapshot` by then."""
        ...


@dataclass(frozen=True)
class Named:
    """Files by their names, of which a repository has at least one; the folder of chat templates stands for each."""

    asked: tuple[str, ...]

    rest_is: ClassVar[str] = "files"

    @property
    def told(self) -> tuple[str, ...]:
        return self.asked

    def first(self, names: Collection[str], where: str) -> list[str]:
        return [name for name in names if name in self.asked or (TEMPLATES in self.asked and is_template(name))]

    def rest(self, names: Collection[str], where: str, snapshot: Path) -> list[str]:
        return []


class HeldId(str):
    """A hub id that means one commit, whoever asks for files of it: the one that was found the first time."""

    commit: str | None = None


def held(path_or_id: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """What is read more than once, as of one moment: a path whose directory is held open, or an id of one commit."""
    found = reading.held_if_there(path_or_id)
    return HeldId(found) if type(found) is str else found


def resolve(
    path_or_id: safe_files.PathLike,
    files: WantedFiles | Iterable[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a path, or of a hub id whose `files` are downloaded, all at one commit.

    A HeldId is at the commit that it had the first time, whatever `revision` means by now. Of names those the
    repository has, at least one. Where the hub does not answer, a complete copy in the cache is used, with a warning
    unless offline is what was asked for.
    Raises CheckpointNotFoundError (for a path), HubError and its kinds, and what the choice of files raises.
    """
    path = safe_files.as_path(path_or_id)
    if isinstance(path, reading.HeldPath) or (path_or_id and os.path.exists(path)):
        return path
    if not isinstance(path_or_id, str) or _looks_like_path(path_or_id, path):
        raise CheckpointNotFoundError(f"{path}: no such file or directory; check the path.")
    cache = os.path.expanduser(cache_dir) if cache_dir is not None else None
    known = getattr(path_or_id, "commit", None)
    repository = Repository(str(path_or_id), known or revision, cache, token)
    choice = Named(tuple(files)) if isinstance(files, Iterable) else files
    for part in (part for name in choice.asked for part in name.split("/")):
        safe_files.check_bare_name(part, path_or_id)
    snapshot = _resolved(repository, choice, local_files_only)
    if isinstance(path_or_id, HeldId):
        path_or_id.commit = snapshot.name
    return snapshot


def _resolved(repository: Repository, choice: WantedFiles, local_files_only: bool) -> Path:
    """The snapshot of a repository, from the hub or from the cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository.id)
        if local_files_only or constants.HF_HUB_OFFLINE:
            return _cached(repository, choice)
        return _download(repository, choice)
    except Exception as error:
        failure = our_error(error, repository)
        snapshot = None
        if type(failure) in (HubError, HubTimeoutError, OfflineError) and not local_files_only:
            with contextlib.suppress(OfflineError):
                snapshot = _cached(repository, choice)
        if snapshot is None:
            if failure is error:
                raise
            raise failure from error
        warn(f"{failure} Its copy in the cache, commit {snapshot.name}, is used.")
        return snapshot


def _looks_like_path(text: str, path: Path) -> bool:
    """Hub ids have at most one slash, no leading dot, no weights' suffix, and no directory on this disk before it."""
    several = text.count("/") > 1 or "\\" in text
    if text.startswith((".", "/", "~")) or text.endswith(("/", *_SUFFIXES)) or several:
        return True
    return len(path.parts) > 1 and os.path.exists(path.parent)


def _download(repository: Repository, choice: WantedFiles) -> Path:
    """Resolve the commit once and fetch what is wanted of it."""
    commit, announced = wire.listing(repository)
    first = choice.first(announced, str(repository))
    _fetch(repository, commit, first, announced)
    rest = choice.rest(announced, str(repository), cache.snapshot(repository, commit))
    if absent := [name for name in rest if name not in announced]:
        raise FileNotOnHubError(f"{repository}: the repository lacks {', '.join(absent)}, which its index names.")
    if not first and not rest:
        advice = unread.advice(announced) or "check the id"
        raise FileNotOnHubError(f"{repository}: the repository has none of {', '.join(choice.told)}; {advice}.")
    _fetch(repository, commit, rest, announced)
    cache.sweep(repository, commit)
    cache.remember(repository, commit)
    return cache.folder(repository) / "snapshots" / commit


def _fetch(repository: Repository, commit: str, names: Sequence[str], announced: Mapping[str, Announced]) -> None:
    """Have files of one commit in the cache, each compared with what the hub announced before it is published."""
    if len({name.casefold() for name in names}) < len(names):
        raise UnsafeFileError(f"{repository}: has files whose names differ in nothing but case; refused.")

    def fetch(name: str) -> None:
        if not _have(repository, commit, name, announced[name]):
            with cache.arriving(repository, commit, name) as (path, descriptor):
                if not _have(repository, commit, name, announced[name]):  # another process may have fetched it
                    _fetch_one(repository, commit, name, announced[name], path, descriptor)

    with Threads(_DOWNLOADS_AT_ONCE) as threads:
        list(threads.map(fetch, names))


def _have(repository: Repository, commit: str, name: str, expected: Announced) -> bool:
    """Whether the cache has a file, compared now if it never was."""
    path = cache.found(repository, commit, name)
    if path is None and (known := cache.blob(repository, expected.sha256)):
        wire.ask_for(repository, commit, name)
        if not cache.is_verified(repository, known):
            _check(known, expected, repository)
        path = cache.publish(repository, commit, name, known, expected.sha256)
    if path is not None and not cache.is_verified(repository, path):
        _check(path, expected, repository)
        cache.note_verified(repository, path)
    return path is not None


def _fetch_one(
    repository: Repository, commit: str, name: str, expected: Announced, path: Path, descriptor: int
) -> None:
    """Download, compare, publish; a connection that breaks off is taken up again while more comes."""
    before = -1
    while True:
        try:
            wire.download(repository, commit, name, expected, descriptor)
            break
        except Exception as error:
            came = os.fstat(descriptor).st_size
            broken = isinstance(our_error(error, repository), (DownloadCorruptError, HubTimeoutError))
            if not broken or isinstance(error, MistralError) or expected.sha256 is None or came <= before + (1 << 20):
                if expected.sha256 is None:
                    path.unlink(missing_ok=True)
                raise
            before = came
    os.fsync(descriptor)
    _check(path, expected, repository)
    cache.publish(repository, commit, name, path, expected.sha256)


def _check(path: Path, expected: Announced, repository: Repository) -> None:
    """Remove a file that is not what was announced, and raise DownloadCorruptError."""
    size, sha256 = reading.size_of(path), expected.sha256
    if sha256 is not None:
        sha256 = reading.sha256(path)
    if sha256 != expected.sha256 or size != (size if expected.size is None else expected.size):
        if path.is_symlink():
            (path.parent / os.readlink(path)).unlink()
        path.unlink(missing_ok=True)
        raise DownloadCorruptError(
            f"{repository}: {path.name} arrived with {size} bytes and SHA-256 {sha256}, the hub announced "
            f"{expected.size} and {expected.sha256}; it was removed, load again."
        )


def _cached(repository: Repository, choice: WantedFiles) -> Path:
    """The snapshot in the cache, or OfflineError with what it lacks; what was never compared is compared now."""
    commit = cache.commit_of(repository)
    found = [name for name in choice.asked if commit and cache.found(repository, commit, name)]
    if commit is None or not found:
        raise OfflineError(
            f"{repository}: no such path here, and, offline, the cache has none of {', '.join(choice.told)}; check the "
            "path, or load it once online, or check cache_dir."
        )
    snapshot = cache.snapshot(repository, commit)
    present = {name for name, path in reading.files_below(snapshot).items() if path.is_file()}
    try:
        rest = choice.rest(present, str(repository), snapshot)
    except FileNotOnHubError as cause:
        raise _incomplete(repository, snapshot, choice.rest_is) from cause
    if missing := [name for name in rest if name not in present]:
        raise _incomplete(repository, snapshot, ", ".join(missing))
    for name in dict.fromkeys([*found, *rest]):
        if (sha256 := cache.expected(snapshot / name)) is not None:
            _have(repository, commit, name, Announced(None, sha256))
    return cache.folder(repository) / "snapshots" / commit


def _incomplete(repository: Repository, snapshot: Path, missing: str) -> OfflineError:
    return OfflineError(
        f"{repository}: offline, and the cache lacks {missing} of commit {snapshot.name}; load it once online."
    )
