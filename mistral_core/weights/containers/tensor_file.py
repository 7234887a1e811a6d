"""Tensors at places in files: what every container of weights is, once its header is understood."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from ...disk import files, limits
from ...disk.reading import opened
from ...errors import (
    CorruptCheckpointError,
    DtypeMismatchError,
    LimitExceededError,
    ShapeMismatchError,
    TruncatedFileError,
)

MAX_TENSORS = limits.TENSORS
MAX_RANK = limits.RANK

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
"""What weights may be stored as: code -> NumPy dtype, in the order of the safetensors library."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

PACKED = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""What numbers of quantised weights may be stored as; `TensorFile.read_packed` gives them as they are."""

STORED = {code: {**DTYPES, **PACKED}[code] for code in (
    "I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "U8",
)}  # fmt: skip
"""All that is written, in the order of the safetensors library: code -> NumPy dtype."""
STORED_CODES = {dtype: code for code, dtype in STORED.items()}


class TensorInfo(NamedTuple):
    """Where a tensor lies: absolute byte offsets in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    more: tuple[tuple[int, int], ...] = ()
    """Where it goes on, for a tensor in several pieces."""

    @property
    def extents(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of every piece, in the order of the tensor's bytes."""
        return ((self.start, self.end), *self.more)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return sum(end - start for start, end in self.extents)


def _rows(info: TensorInfo, rows: slice | None) -> TensorInfo:
    """Where some rows of a tensor lie, if they lie in one piece, as a tensor of its own; else the whole tensor."""
    if rows is None or info.more or not info.shape or not info.shape[0]:
        return info
    start, stop, _ = rows.indices(info.shape[0])
    row, stop = info.nbytes // info.shape[0], max(start, stop)
    return info._replace(
        shape=(stop - start, *info.shape[1:]), start=info.start + start * row, end=info.start + stop * row
    )


class TensorFile:
    """A file whose header is understood, and, by `read`, its tensors; it is opened for each, or kept open."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: dict[str, str]
    stamp: tuple[int, int, int, int]
    kept: Kept | None = None

    def keep_open(self) -> None:
        """Keep the file whose header was read, whatever its name leads to later; raises CorruptCheckpointError."""
        with opened(self.path) as descriptor:
            self._check_stamp(descriptor)
            with suppress(OSError):  # too many are open: it is opened for each read
                self.kept = Kept(descriptor)

    def read(self, name: str, rows: slice | None = None, *, cached: bool = True) -> np.ndarray:
        """A fresh array with the stored bits of a tensor or of its `rows`; the system keeps no copy unless `cached`.

        Rows that lie in one piece are read in one piece, and nothing else of the file.
        Raises CorruptCheckpointError if the file changed since its header was read, DtypeMismatchError.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DtypeMismatchError(f"{self.path}: {quoted(name)} is {info.dtype}; {supported()}.")
        part = _rows(info, rows)
        data = self._read_bytes(part, cached).view(DTYPES[info.dtype]).reshape(part.shape)
        return data if rows is None or part is not info else data[rows]

    def read_packed(self, name: str) -> np.ndarray:
        """The numbers of any tensor, quantised ones as they are stored; raises what `read` raises."""
        info = self.tensors[name]
        dtype = DTYPES.get(info.dtype) or PACKED.get(info.dtype)
        if dtype is None:
            known = ", ".join([*DTYPES, *PACKED])
            raise DtypeMismatchError(f"{self.path}: {quoted(name)} is {info.dtype}; {known} are read.")
        return self.read_bytes(name).view(dtype).reshape(info.shape)

    def read_bytes(self, name: str, *, cached: bool = True) -> np.ndarray:
        """The bytes of one tensor; raises CorruptCheckpointError if the file changed since its header was read."""
        return self._read_bytes(self.tensors[name], cached)

    def _read_bytes(self, info: TensorInfo, cached: bool) -> np.ndarray:
        data = _aligned(info.nbytes)
        with self._opened() as descriptor:
            done, whole = 0, True
            for start, end in info.extents:
                whole &= read_at(descriptor, data.data[done : done + end - start], start)
                done += end - start
                if not cached and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
            self._check_stamp(descriptor, whole)
        return data

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if the file is not the one whose header was read."""
        with self._opened() as descriptor:
            self._check_stamp(descriptor)

    def _opened(self) -> AbstractContextManager[int]:
        return opened(self.path) if self.kept is None else nullcontext(self.kept.descriptor)

    def _check_stamp(self, descriptor: int, whole: bool = True) -> None:
        if not whole or stamp_of(descriptor) != self.stamp:
            raise CorruptCheckpointError(f"{self.path}: changed while it was read; load it again.")


Seen = Mapping[Path, TensorFile]
"""Files whose headers are understood already, by their paths."""
UNSEEN: Seen = MappingProxyType({})


class Kept:
    """A copy of a descriptor, closed when nobody reads by it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)

    def __deepcopy__(self, memo: object) -> Kept:
        """Itself: a copy would close what it has not opened."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("an opened file is no other process's")

    def __del__(self) -> None:
        with suppress(AttributeError, OSError, TypeError):  # at the end of the interpreter
            os.close(self.descriptor)


def _aligned(size: int) -> np.ndarray:
    """Fresh bytes that begin at a multiple of 64, which JAX and TensorFlow take over without a copy."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def write(info: TensorInfo, array: np.ndarray) -> None:
    """Put one tensor, of any strides, at its place.

    Raises ShapeMismatchError or DtypeMismatchError if it is not what its place was made for.
    """
    if array.shape != info.shape:
        raise ShapeMismatchError(f"{quoted(info.name)}: {array.shape}, the config says {info.shape}.")
    if STORED_CODES.get(array.dtype) != info.dtype:
        raise DtypeMismatchError(f"{quoted(info.name)}: {array.dtype}, {info.dtype} was announced; cast it first.")
    write_bytes(info, as_bytes(array))


def write_bytes(info: TensorInfo, data: memoryview) -> None:
    """Put a tensor's bytes at its place."""
    with files.opened_to_write(info.file) as descriptor:
        done = 0
        for start, end in info.extents:
            files.write_at(descriptor, data[done : done + end - start], start)
            done += end - start


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row-major order."""
    return hashlib.sha256(as_bytes(array)).hexdigest()


def quoted(name: str) -> str:
    """A name out of a file, made safe and short for a message."""
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(name)} characters)"


def supported() -> str:
    """What weights are read as, for messages."""
    return f"weights are read as {', '.join(DTYPES)}"


# Bytes


def stamp_of(descriptor: int) -> tuple[int, int, int, int]:
    """What changes when a file does; its size stands third."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_size(path: Path, size: int, limit: int) -> None:
    """Raise LimitExceededError where a small file is not small."""
    if size > limit:
        raise LimitExceededError(f"{path}: {size} bytes; at most {limit} are read.")


def read_at(descriptor: int, view: memoryview, offset: int) -> bool:
    """Fill a buffer from an offset; False if the file ends before."""
    while view:
        count = os.preadv(descriptor, [view[: 1 << 30]], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def first_bytes(path: Path) -> bytes:
    """The beginning of a file; raises TruncatedFileError if it is empty, CorruptCheckpointError for an LFS pointer."""
    with opened(path) as descriptor:
        first = os.pread(descriptor, 256, 0)
    if not first:
        raise TruncatedFileError(f"{path}: 0 bytes; copy or download it again.")
    refuse_pointer(path, first)
    return first


def refuse_pointer(path: Path, first: bytes) -> None:
    """Raise CorruptCheckpointError where the beginning of a file is that of a Git LFS pointer."""
    if first.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`.")


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes in row-major order; bfloat16 has no buffer of its own, so it is viewed as uint8."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def reserve(path: Path, header: bytes, size: int) -> None:
    """Make a file of `size` bytes that begins with a header."""
    with files.opened_to_write(path, new=True) as descriptor:
        files.write_at(descriptor, header, 0)
        os.ftruncate(descriptor, size)
