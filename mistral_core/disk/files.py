"""The safe write: a file or a whole directory is the old one or the new one, never something between."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..errors import ConversionError, MistralError, NoSpaceError, OutputBusyError, OutputExistsError, UnsafeFileError
from .reading import PathLike as PathLike
from .reading import as_path as as_path
from .reading import is_path
from .undisturbed import undisturbed

WEIGHT_FILES = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "consolidated*.safetensors",
    "mistral_manifest.json",
)
"""What a rewritten checkpoint directory never keeps from its predecessor."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXCHANGE_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_LEFT = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")


def write_file(path: PathLike, data: bytes) -> None:
    """Write a file atomically and durably; missing parents are made. A file that is replaced keeps its mode.

    What killed writers left beside it is removed. Raises NoSpaceError or ConversionError; an older file is then
    untouched.
    """
    path = as_path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_files(path.parent)
        with _temporary_file(path) as (temporary, descriptor):
            write_at(descriptor, data, 0)
            os.fsync(descriptor)
            os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside another, no more open than that, locked while this process writes it; removed if it fails."""
    before = _mode(path)
    while True:
        temporary = _sibling(path, "tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666 if before is None else 0o600)
        _flock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # a sweep came between
    try:
        if before is not None:
            os.fchmod(descriptor, before)
        yield temporary, descriptor
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int | None:
    """The permissions of what is there; None where there is nothing."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode) & 0o777
    except OSError:
        return None


def sweep_files(directory: Path) -> None:
    """Remove the temporary files of writers that are no more; those that are hold a lock on theirs."""
    for entry in [each for each in os.scandir(directory) if _LEFT.fullmatch(each.name)]:
        with contextlib.suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def errors_named_for(temporary: Path, name: PathLike) -> Iterator[None]:
    """Let errors name what the user gave, not the temporary path by which it was reached."""
    try:
        yield
    except (MistralError, OSError) as error:
        old, new = str(temporary), os.fsdecode(name)
        error.args = tuple(each.replace(old, new) if isinstance(each, str) else each for each in error.args)
        for field in ("strerror", "filename"):
            if isinstance(text := getattr(error, field, None), str):
                setattr(error, field, text.replace(old, new))
        raise


@contextlib.contextmanager
def opened_to_write(path: Path, *, new: bool = False) -> Iterator[int]:
    """A descriptor of a file that is there, or of one that is `new`; no link is followed. Raises OSError."""
    flags = os.O_CREAT | os.O_EXCL if new else 0
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_file(path: Path, *, wait: bool = True) -> Iterator[int]:
    """A descriptor of a file, made if it is not there, that nobody else has in this way at the same time.

    Raises OSError: BlockingIOError where somebody has it, unless it should `wait`.
    """
    while True:
        try:
            os.makedirs(path.parent, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(path.parent):
                raise
            continue  # who was done has removed the empty directory
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "no regular file", str(path))
            _flock(descriptor, wait)
            with contextlib.suppress(FileNotFoundError):  # who had it before may have given it another place
                here = os.path.samestat(os.stat(path), os.fstat(descriptor))
                if here:
                    break
            os.close(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks: what is swapped in one step is whole all the same


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset; `os.pwrite` may write fewer."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextlib.contextmanager
def os_errors(path: PathLike) -> Iterator[None]:
    """Turn OSErrors into NoSpaceError (`errno` kept) or ConversionError; errors of this project pass.

    Raises ConversionError for what can be no path.
    """
    if not is_path(path):
        raise ConversionError(f"path must be without NUL and half surrogates, got {str(path)[:200]!a}.")
    try:
        yield
    except MistralError:
        raise
    except OSError as cause:
        where = os.fsdecode(path)
        if cause.errno in _FULL:
            message = f"{where}: {cause.strerror}; free some space, what was there before is untouched."
            raise NoSpaceError(cause.errno, message) from cause
        reason = cause.strerror or type(cause).__name__
        raise ConversionError(f"{where}: cannot be written ({reason}); check the path and its rights.") from cause


def check_bare_name(name: str, where: str) -> None:
    """Raise UnsafeFileError unless a name out of a file is a plain file name on every system."""
    if name in ("", ".", "..") or len(name) > 255 or any(c in "/\\:" or not c.isprintable() for c in name):
        raise UnsafeFileError(f"{where}: {name[:200]!a} is not a bare file name; refused.")


def is_weights(name: str) -> bool:
    """Whether a file name is one of `WEIGHT_FILES`."""
    return _matches(name, WEIGHT_FILES)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def require_space(directory: PathLike, size: int) -> None:
    """Raise NoSpaceError unless `size` bytes and 5 % fit on the file system of a directory."""
    needed, free = size + size // 20, shutil.disk_usage(os.fsdecode(directory)).free
    if needed > free:
        message = f"{os.fsdecode(directory)}: {needed} bytes are needed and {free} are free; free some space."
        raise NoSpaceError(errno.ENOSPC, message)


# A directory as one unit


@contextlib.contextmanager
def atomic_directory(
    target: PathLike, *, overwrite: bool = True, replaces: Collection[str] = WEIGHT_FILES, most: int = 0o777
) -> Iterator[Path]:
    """Yield an empty sibling directory that takes the place of `target` if, and only if, the body succeeds.

    What the old directory has and the new one lacks is carried along, but for names that match one of `replaces`.
    A file that replaces another keeps its mode, the directory too; nothing is more open than `most` allows.
    Raises OutputExistsError, OutputBusyError, NoSpaceError, ConversionError; the old one is then untouched.
    """
    with os_errors(target):
        path = _checked(target, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _sweep(path)
            _checked(path, overwrite)
            temporary = _sibling(path, "tmp")
            try:
                temporary.mkdir()
                mode = _mode(path) or _mode(temporary) or 0o700
                temporary.chmod(0o700)  # until it is known to be as closed as it has to be
                with errors_named_for(temporary, path):
                    yield temporary
                if path.exists():
                    _keep_modes(path, temporary)
                    _carry(path, temporary, replaces)
                _close_to(temporary, most)
                temporary.chmod(mode & (most | (most & 0o444) >> 2 | 0o700))
                sync_tree(temporary)
                _swap(temporary, path)
            finally:
                with undisturbed():
                    shutil.rmtree(temporary, ignore_errors=True)


def _checked(target: PathLike, overwrite: bool) -> Path:
    """The real path of a directory that may be replaced as a whole."""
    path = Path(os.path.realpath(as_path(target)))
    if not overwrite and os.path.lexists(path):
        raise OutputExistsError(f"{path}: is there already; choose another path or pass overwrite=True.")
    if path.exists() and not path.is_dir():
        raise ConversionError(f"{path} must be a directory, got a file.")
    if os.path.ismount(path):
        raise ConversionError(f"{path}: is a mount point and cannot be replaced; write to a directory in it.")
    if Path.cwd().is_relative_to(path):
        raise ConversionError(f"{path}: holds the current directory and cannot be replaced; cd elsewhere.")
    return path


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _sweep(path: Path) -> None:
    """Remove what dead processes left beside `path`; a directory lost between two renames comes back."""
    for kind in ("old", "tmp"):
        prefix = f".{path.name}.{kind}-"
        for entry in [e for e in os.scandir(path.parent) if e.name.startswith(prefix)]:
            pid = entry.name.removeprefix(prefix).partition("-")[0]
            # our own pid is stale too: we hold the lock, and in containers pids repeat
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_alive(int(pid))):
                continue
            if kind == "old" and not path.exists():
                os.rename(entry.path, path)
            else:
                shutil.rmtree(entry.path, ignore_errors=True)


def _carry(old: Path, new: Path, replaces: Collection[str]) -> None:
    """Bring along what is not replaced."""
    for entry in os.scandir(old):
        destination = new / entry.name
        if os.path.lexists(destination) or _matches(entry.name, replaces) or _LEFT.fullmatch(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, destination, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, destination)


def _keep_modes(old: Path, new: Path) -> None:
    """Give files the modes of those that they replace."""
    for root, _, names in os.walk(new):
        for name in names:
            path = Path(root, name)
            before = old / path.relative_to(new)
            if (mode := _mode(before)) is not None and stat.S_ISREG(os.lstat(before).st_mode):
                path.chmod(mode)


def _close_to(directory: Path, most: int) -> None:
    """Take from new files what `most` does not allow; those that were carried along have other names too."""
    for root, _, names in os.walk(directory) if most != 0o777 else ():
        for name in names:
            status = os.lstat(os.path.join(root, name))
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                os.chmod(os.path.join(root, name), stat.S_IMODE(status.st_mode) & (most | 0o600))


def _link(source: str, destination: PathLike) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # file systems without hard links
        shutil.copy2(source, os.fsdecode(destination), follow_symlinks=False)


def sync_tree(directory: Path) -> None:
    """Let every file and directory below a directory reach the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            if stat.S_ISREG(os.lstat(os.path.join(root, name)).st_mode):
                _sync(os.path.join(root, name))
        _sync(root)


def _sync(path: PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was there is afterwards at `new`, or gone."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _exchange(new: Path, target: Path) -> bool:
    """Swap two paths in one step; False where the system or its file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _EXCHANGE_UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(target))
    return False


# The lock


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let nobody else write a target: a file beside it is locked, by the kernel, which knows when a process ends."""
    lock = target.with_name(f"{target.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            with undisturbed():
                stack.enter_context(locked_file(lock, wait=False))
                stack.callback(_unlink, lock)
        except BlockingIOError as cause:
            raise OutputBusyError(f"{target}: another process is writing it and holds {lock}; wait for it.") from cause
        yield


def _unlink(lock: Path) -> None:
    with undisturbed():
        lock.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
