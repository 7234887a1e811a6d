"""A C source of this package as a shared library: compiled once by the user's compiler and kept in his cache."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from ..disk import reading
from ..errors import CheckpointError

SWITCH = "MISTRAL_NATIVE"
"""The environment variable that says `off`."""
SECONDS = 120
"""The longest that a compiler is waited for."""
COMPILERS = ("cc", "gcc", "clang")
"""Looked for in this order where CC names none."""
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-Werror=implicit-function-declaration")
HEADERS = ("bound.h", "numbers.h", "formulas.h", "seeing.h", "step.h", "tiles.h")
"""What sources here may include, beside the system's."""
PROCESSORS = (("-march=native",), ("-mcpu=native",), ())
"""How compilers are told to make code for this processor; the first that one takes."""


class _Reason(Exception):
    """Why there is no library, as a sentence."""


def library(source: str, *, flags: tuple[str, ...] = ()) -> Path | None:
    """The shared library made of a source in this directory; None where there is none, and `why` says why.

    What was compiled before, by any process, is found in the cache. One process tries once.
    """
    found = _tried(source, flags)
    return found if isinstance(found, Path) else None


def why(source: str, *, flags: tuple[str, ...] = ()) -> str:
    """Why there is no shared library of a source, as a sentence; empty where there is one."""
    found = _tried(source, flags)
    return "" if isinstance(found, Path) else found


@functools.cache
def _tried(source: str, flags: tuple[str, ...]) -> Path | str:
    try:
        return _library(source, flags)
    except _Reason as reason:
        return str(reason)
    except (OSError, CheckpointError) as error:
        return f"{source} is not compiled: {error}."


def _library(source: str, flags: tuple[str, ...]) -> Path:
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        raise _Reason(f"{SWITCH} is {os.environ[SWITCH]}; unset it to have the kernels in C.")
    if sys.platform == "win32":
        raise _Reason("the kernels in C need threads of POSIX, which Windows has not.")
    compiler = _compiler()
    text = reading.read(Path(__file__).with_name(source))
    directory, headers = _cache(), b"".join(reading.read(Path(__file__).with_name(name)) for name in HEADERS)
    made = directory / _key(text + headers, compiler, flags) / f"{Path(source).stem}.so"
    if not made.exists():
        _private(made.parent)
        _compile(text, compiler, flags, made)
    _check_own(made)
    return made


def _compiler() -> list[str]:
    """The compiler's command: what CC says, or the first that is there."""
    asked = shlex.split(os.environ.get("CC", ""))
    for name in asked[:1] or COMPILERS:
        if path := shutil.which(name):
            return [path, *asked[1:]]
    wanted = f"CC is {asked[0]}, which is not there" if asked else "no C compiler (cc, gcc, clang) is there"
    raise _Reason(f"{wanted}; install one to have the kernels in C.")


def _key(text: bytes, compiler: list[str], flags: tuple[str, ...]) -> str:
    """A name for what this source, compiler and processor make."""
    real = os.path.realpath(compiler[0])
    status = os.stat(real)
    told = (*compiler[1:], *FLAGS, PROCESSORS, *flags)
    parts = [real, status.st_size, status.st_mtime_ns, *told, platform.platform(), _processor()]
    return hashlib.sha256(text + "\0".join(map(str, parts)).encode()).hexdigest()[:32]


def is_intel() -> bool:
    """Whether Intel made the processor, as far as the system says."""
    return _facts().get("vendor_id") == "GenuineIntel"


def _processor() -> str:
    """The processor's name and what it can do: a home directory is seen from several machines."""
    facts, wanted = _facts(), ("model name", "flags", "Features", "CPU part")
    if not facts:
        return f"{platform.machine()} {platform.processor()}"
    return platform.machine() + "".join(facts.get(name, "") for name in wanted)


@functools.cache
def _facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = reading.head(Path("/proc/cpuinfo"), 16384).decode(errors="replace").splitlines()
    except (OSError, CheckpointError):
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}


def _cache() -> Path:
    """Where compiled libraries are: in the user's cache, in directories that are his alone."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise _Reason(f"XDG_CACHE_HOME must be an absolute path, got {base!r}.")
    os.makedirs(base, mode=0o700, exist_ok=True)
    directory = Path(base)
    for name in ("mistral-frameworks", "native"):
        directory = directory / name
        _private(directory)
    return directory


def _private(directory: Path) -> None:
    """Make a directory for this user alone, or see that it is one."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        _check_own(directory)


def _check_own(path: Path) -> None:
    """Refuse what another user owns or may write: a library that is loaded runs."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise _Reason(f"{path} must be no link; remove it.")
    if status.st_uid != os.geteuid():
        raise _Reason(f"{path} must be this user's own, got user {status.st_uid}'s; set XDG_CACHE_HOME.")
    if status.st_mode & 0o022:
        raise _Reason(
            f"{path} must be writable for its owner only, got mode {status.st_mode & 0o777:o}; chmod go-w it."
        )


def _compile(text: bytes, compiler: list[str], flags: tuple[str, ...], made: Path) -> None:
    """Compile a source beside its place, and put the library there in one step."""
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".") as scratch:
        result = Path(scratch) / made.name
        first = ""
        for processor in PROCESSORS:
            here = f"-I{Path(__file__).parent}"
            command = [*compiler, *FLAGS, *processor, here, "-x", "c", "-", "-o", str(result), *flags, "-lm"]
            message = _said(command, text, scratch)
            if not message:
                os.chmod(result, 0o700)
                os.replace(result, made)
                return
            first = first or message
    raise _Reason(f"{shlex.join(compiler)} does not compile {made.stem}.c: {first}")


def _said(command: list[str], text: bytes, scratch: str) -> str:
    """What a compiler complains of; empty where it made a library."""
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": scratch}
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=SECONDS, env=environment, cwd=scratch)
    except subprocess.TimeoutExpired:
        return f"it took more than {SECONDS} seconds."
    if done.returncode == 0 and os.path.exists(command[command.index("-o") + 1]):
        return ""
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line] or lines or [f"it ended with {done.returncode}"]
    return errors[0].strip()[:300]
