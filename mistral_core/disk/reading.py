"""The one way to read a file: a regular one, of bounded size, found without leaving its directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from ..errors import CheckpointError, CheckpointNotFoundError, LimitExceededError, MistralError, UnsafeFileError
from . import limits
from .folder import Folder, check_regular

PathLike = str | bytes | os.PathLike[str]

_T = TypeVar("_T")


class HeldPath(PosixPath):
    """A path below a directory that is held open: everything is read from the directory as it was then.

    It is written and compared as any other path. What is joined to it is held too.
    """

    folder: Folder | None = None

    def __truediv__(self, key: Any) -> HeldPath:
        return self._held(super().__truediv__(key))

    def joinpath(self, *parts: Any) -> HeldPath:
        """As `/`."""
        return self._held(super().joinpath(*parts))

    def with_name(self, name: str) -> HeldPath:
        """Another name in the same directory."""
        return self._held(super().with_name(name))

    def absolute(self) -> HeldPath:
        """The same place by its absolute path."""
        return self._held(super().absolute())

    @property
    def parent(self) -> HeldPath:
        """The directory that it lies in, held if it is not above the one that is."""
        return self._held(super().parent)

    def exists(self, *_: Any, **__: Any) -> bool:
        """Whether anything stands under the name, be it a link that leads nowhere."""
        return self._status(links=False) is not None

    def is_file(self, *_: Any, **__: Any) -> bool:
        """Whether it is a regular file."""
        found = self._status(links=True)
        return found is not None and stat.S_ISREG(found.st_mode)

    def is_dir(self, *_: Any, **__: Any) -> bool:
        """Whether it is a directory."""
        found = self._status(links=True)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def is_symlink(self) -> bool:
        """Whether it is a link."""
        found = self._status(links=False)
        return found is not None and stat.S_ISLNK(found.st_mode)

    def stat(self, **options: Any) -> os.stat_result:
        """What the system says of it, in the directory that is held."""
        with _typed(self), _placed(self) as (folder, name):
            return (folder.status if options.get("follow_symlinks", True) else folder.link_status)(name, str(self))

    def iterdir(self) -> Generator[HeldPath, None, None]:
        """What the directory holds, sorted by name."""
        yield from [self / name for name in names(self)]

    def _held(self, path: Path) -> HeldPath:
        held = HeldPath(path)
        held.folder = self.folder
        return held

    def _status(self, *, links: bool) -> os.stat_result | None:
        try:
            with _placed(self) as (folder, name):
                return (folder.status if links else folder.link_status)(name, str(self))
        except (FileNotFoundError, NotADirectoryError):
            return None


def held(path: Path) -> Path:
    """The path with its directory held open: itself if it is one, else the one that it lies in.

    A path that leads nowhere is given back as it is.
    """
    if isinstance(path, HeldPath):
        return path
    try:
        folder = Folder(path if os.path.isdir(path) else path.parent)
    except (OSError, ValueError):
        return path
    found = HeldPath(path)
    found.folder = folder
    return found


def held_if_there(path_or_id: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path with its directory held open; what is no path here stays what it is."""
    path = held(as_path(path_or_id))
    return path if isinstance(path, HeldPath) and path.exists() else path_or_id


def is_replaced(path: Path) -> bool:
    """Whether the path of a directory that is held leads to another one by now, or nowhere."""
    folder: Folder | None = getattr(path, "folder", None)
    return folder is not None and folder.is_gone


def of_one_moment(path: Path, make: Callable[[Path], _T]) -> _T:
    """What is made of a path whose directory is held open: once more where another directory took its place meanwhile.

    A path that is held already is not opened anew. Raises what `make` raises.
    """
    for _ in range(limits.ATTEMPTS - 1):
        opened_path = held(path)
        try:
            return make(opened_path)
        except MistralError:
            folder = getattr(opened_path, "folder", None)
            if opened_path is path or folder is None or not folder.is_gone:
                raise
    return make(held(path))


def as_path(path: PathLike) -> Path:
    """A Path of a str, bytes or path-like, `~` expanded; a held one stays what it is."""
    return path if isinstance(path, HeldPath) else Path(os.path.expanduser(os.fsdecode(path)))


def is_path(path: PathLike) -> bool:
    """Whether the system could have a file of this name."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; a FIFO or a device neither blocks nor is read, a link leads nowhere else.

    Raises CheckpointNotFoundError, UnsafeFileError, CorruptCheckpointError (the directory was replaced since it is
    held), CheckpointError with the system's `errno`, also for what the body raises.
    """
    with _typed(path), _placed(path) as (folder, name), folder.opened(name, str(path)) as descriptor:
        yield descriptor


def read(path: Path, *, limit: int = limits.JSON_BYTES, what: str = "") -> bytes:
    """The whole of a small file; raises what `opened` raises, and LimitExceededError above `limit` bytes."""
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        data = _filled(descriptor, limit + 1) if size <= limit else b""
        if max(size, len(data)) > limit:
            raise LimitExceededError(f"{path}: {max(size, len(data))} bytes{what}; at most {limit} are read.")
        return data


def part(descriptor: int, path: Path, start: int, count: int) -> bytes:
    """So many bytes of an opened file from a place on, fewer at its end; raises CheckpointError."""
    parts: list[bytes] = []
    with _typed(path):
        while count and (found := os.pread(descriptor, count, start)):
            parts.append(found)
            start, count = start + len(found), count - len(found)
    return b"".join(parts)


def head(path: Path, count: int) -> bytes:
    """At most `count` bytes of the beginning of a file; raises what `opened` raises."""
    with opened(path) as descriptor:
        return os.pread(descriptor, count, 0)


def status_of(path: Path) -> os.stat_result:
    """What the system says of a regular file, without opening it; raises what `opened` raises."""
    with _typed(path), _placed(path) as (folder, name):
        found = folder.status(name, str(path))
    check_regular(found, str(path))
    return found


def size_of(path: Path) -> int:
    """The bytes of a regular file; raises what `opened` raises."""
    return status_of(path).st_size


def sha256(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal; raises what `opened` raises."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 18))
    with opened(path) as descriptor:
        while count := os.readv(descriptor, [buffer]):
            found.update(buffer[:count])
    return found.hexdigest()


def names(path: Path) -> list[str]:
    """What a directory holds, sorted; raises what `opened` raises, and LimitExceededError."""
    with _typed(path), _placed(path) as (folder, name):
        found = folder.names(name, str(path))
    limits.check(len(found), limits.FILES, what="files", where=str(path))
    return found


def files_below(path: Path, *, most: int = limits.FILES) -> dict[str, Path]:
    """Every file below a directory by its relative name, links to files among them; no linked directory is entered.

    Raises LimitExceededError, and what `names` raises.
    """
    root = held(path)
    return {name: root / name for name in _entries_below(root, most)}


def statuses_below(path: Path, *, most: int = limits.FILES) -> dict[Path, os.stat_result]:
    """The same files with what the system says of each, links followed; raises UnsafeFileError for what is no file."""
    root = held(path)
    found = {}
    for name, status in _entries_below(root, most).items():
        if not stat.S_ISREG(status.st_mode):
            status = status_of(root / name)
        found[root / name] = status
    return found


def _entries_below(root: Path, most: int) -> dict[str, os.stat_result]:
    """Everything but directories below a directory, by its relative name, as it lies there."""
    found: dict[str, os.stat_result] = {}
    pending = [""]
    with _typed(root), _placed(root) as (folder, base):
        while pending:
            before = pending.pop()
            for name, status in folder.statuses(f"{base}/{before}", f"{root}/{before}").items():
                if stat.S_ISDIR(status.st_mode):
                    pending.append(f"{before}{name}/")
                else:
                    found[before + name] = status
            limits.check(len(found) + len(pending), most, what="files", where=str(root))
    return dict(sorted(found.items()))


def _filled(descriptor: int, most: int) -> bytes:
    parts: list[bytes] = []
    while most and (part := os.read(descriptor, min(most, 1 << 20))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def _placed(path: Path) -> Iterator[tuple[Folder, str]]:
    """The folder that a path is looked up in, and its name there."""
    if not is_path(path):
        raise UnsafeFileError(f"path must be without NUL and half surrogates, got {str(path)[:200]!a}.")
    folder: Folder | None = getattr(path, "folder", None)
    for root in (folder.path, folder.absolute) if folder else ():
        if folder and path.is_relative_to(root):
            yield folder, path.relative_to(root).as_posix()
            return
    alone = Folder(Path(os.path.dirname(path) or "."))
    try:
        yield alone, os.path.basename(path) or "."
    finally:
        alone.close()


@contextlib.contextmanager
def _typed(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as cause:
        raise CheckpointNotFoundError(errno.ENOENT, f"{path}: no such file; check the path.") from cause
    except OSError as cause:
        raise CheckpointError(cause.errno, f"{path}: cannot be read ({cause.strerror}).") from cause
