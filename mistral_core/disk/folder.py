"""A directory that is held open: names are looked up in it, whatever its path leads to by then.

What a directory holds was put there by others. So a name is followed part by part, each opened relative to the one
before and never through a link: a link is read and followed by us, and leads nowhere but into the same directory. The
hub's cache is one directory a repository (`models--owner--name`), whose snapshots link to its blobs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from ..errors import CorruptCheckpointError, UnsafeFileError

MOST_LINKS = 16  # one after the other, as a path may have; the hub's cache has one
_HUB_FOLDERS = ("models--", "datasets--", "spaces--")
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC  # one may be passed but not listed
_LISTED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))  # fmt: skip


class Folder:
    """An opened directory, and how far links in it may lead."""

    def __init__(self, path: Path) -> None:
        """Open it; raises OSError."""
        self.path, self.absolute = path, Path(os.path.abspath(path))
        real = os.path.realpath(path)
        self._bounds = _bounds(real)
        self._held: list[int] = []
        below = os.path.relpath(real, self._bounds)
        try:
            self._held.append(os.open(self._bounds, _DIRECTORY))
            for part in () if below == "." else below.split(os.sep):
                self._held.append(os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._held[-1]))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; it is done at the end of its life at the latest."""
        while self._held:
            os.close(self._held.pop())

    def __deepcopy__(self, memo: object) -> Folder:
        """Itself: a copy would close what it has not opened."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an opened directory is no other process's")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # at the end of the interpreter
            self.close()

    @property
    def is_gone(self) -> bool:
        """Whether the directory was removed since it was opened, or another one has taken its place."""
        mine = os.fstat(self._held[-1])
        try:
            there = os.stat(self.absolute)
        except OSError:
            return True
        return (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino)

    @contextlib.contextmanager
    def opened(self, name: str, where: str) -> Iterator[int]:
        """A descriptor of the regular file under a name.

        Raises UnsafeFileError (no regular file, a link that leads out), CorruptCheckpointError (the directory was
        replaced), OSError.
        """
        with self._found(name, where) as (directory, last):
            status = os.stat(last, dir_fd=directory, follow_symlinks=False)
            check_regular(status, where)  # to open a device may do something
            descriptor = os.open(last, _FILE, dir_fd=directory)
        try:
            check_regular(os.fstat(descriptor), where)  # it may have become another one
            yield descriptor
        finally:
            os.close(descriptor)

    def status(self, name: str, where: str) -> os.stat_result:
        """What the system says of what is under a name, links followed; raises what `opened` raises."""
        with self._found(name, where) as (directory, last):
            return os.stat(last, dir_fd=directory, follow_symlinks=False)

    def link_status(self, name: str, where: str) -> os.stat_result:
        """What the system says of what is under a name, be it a link; raises what `opened` raises."""
        parent, _, last = name.rpartition("/")
        with self._found(parent or ".", where) as (directory, before):
            inner = os.open(before, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                return os.stat(last, dir_fd=inner, follow_symlinks=False)
            finally:
                os.close(inner)

    def names(self, name: str, where: str) -> list[str]:
        """What is in the directory under a name ("." is this one), sorted; raises what `opened` raises."""
        with self._found(name, where) as (directory, last):
            inner = os.open(last, _LISTED, dir_fd=directory)
            try:
                return sorted(os.listdir(inner))
            finally:
                os.close(inner)

    def statuses(self, name: str, where: str) -> dict[str, os.stat_result]:
        """What is in the directory under a name, and what the system says of it, be it a link; raises as `opened`."""
        with self._found(name, where) as (directory, last):
            inner = os.open(last, _LISTED, dir_fd=directory)
            try:
                with os.scandir(inner) as entries:
                    return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
            finally:
                os.close(inner)

    @contextlib.contextmanager
    def _found(self, name: str, where: str) -> Iterator[tuple[int, str]]:
        """The descriptor of the directory that a name at last leads to, and its name there, which is no link's."""
        way, opened = list(self._held), []
        pending, links = name.split("/")[::-1], 0
        try:
            last = "."
            while pending:
                part = pending.pop()
                if part == "..":
                    last = "."
                    way.pop()
                    if not way:
                        raise self._leads_out(where, name)
                if part in ("", ".", ".."):
                    continue
                found = os.stat(part, dir_fd=way[-1], follow_symlinks=False)
                if stat.S_ISLNK(found.st_mode):
                    links += 1
                    if links > MOST_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), where)
                    target = os.readlink(part, dir_fd=way[-1])
                    if os.path.isabs(target):
                        target = self._within(target, where)
                        del way[1:]
                    pending += target.split("/")[::-1]
                elif any(each not in ("", ".") for each in pending):
                    opened.append(os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=way[-1]))
                    way.append(opened[-1])
                else:
                    last = part
            yield way[-1], last
        except FileNotFoundError as cause:
            if os.fstat(self._held[-1]).st_nlink == 0 or self.is_gone:
                raise CorruptCheckpointError(f"{self.path}: replaced while it was read; load it again.") from cause
            raise
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _within(self, target: str, where: str) -> str:
        """An absolute target relative to the bounds."""
        below = os.path.relpath(target, self._bounds)
        if below.split(os.sep)[0] == "..":
            raise self._leads_out(where, target)
        return below

    def _leads_out(self, where: str, target: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{where}: a link that leads out of its directory (to {target[:200]!a}); name that, or put the file itself "
            "there."
        )


def _bounds(real: str) -> str:
    """The directory that links may not leave: itself, or that of its repository in the hub's cache."""
    parts = real.split(os.sep)
    for place in range(len(parts) - 2, 0, -1):
        if parts[place] == "snapshots" and parts[place - 1].startswith(_HUB_FOLDERS):
            return os.sep.join(parts[:place])
    return real


def check_regular(status: os.stat_result, where: str) -> None:
    """Raise UnsafeFileError for what is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "something else")
        raise UnsafeFileError(f"{where} must be a regular file, got {kind}; remove it or name another.")
