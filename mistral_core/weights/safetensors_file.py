"""One safetensors file: a strict check of its header, then tensors by offset, without mmap."""

from __future__ import annotations

import collections
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DtypeMismatchError,
    LimitExceededError,
    ShapeMismatchError,
    TruncatedFileError,
    UnsafeFileError,
)
from . import files

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 20_000
MAX_RANK = 4

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
"""What weights may be stored as: name in the file -> NumPy dtype, in the library's order in a file."""

CODES = {dtype: code for code, dtype in DTYPES.items()}

_BITS = {
    **{code: 8 * dtype.itemsize for code, dtype in DTYPES.items()},
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "C64": 64,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: absolute byte offsets in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


class SafetensorsFile:
    """A checked header and, by `read`, its tensors; no file is kept open between reads."""

    def __init__(self, path: files.PathLike) -> None:
        """Check the header.

        Raises CheckpointNotFoundError, TruncatedFileError, CorruptCheckpointError, UnsafeFileError,
        LimitExceededError, DtypeMismatchError (an unknown dtype), CheckpointError (with the system's errno).
        """
        self.path = Path(os.fsdecode(path))
        with _opened(self.path) as descriptor:
            self._stamp = _stamp(descriptor)
            size = self._stamp[2]
            header, start = _read_header(self.path, descriptor, size)
            entries = _parse(self.path, header)
            self.metadata: dict[str, str] = _metadata(self.path, entries.pop("__metadata__", {}))
            infos = [_tensor_info(self.path, name, entry, start) for name, entry in entries.items()]
            _check_layout(self.path, infos, start, size)
            self.tensors = {info.name: info for info in infos}

    def read(self, name: str, *, cached: bool = True) -> np.ndarray:
        """A fresh array with the stored bits of one tensor; the system keeps no copy of it unless `cached`.

        Raises CorruptCheckpointError if the file changed since its header was read, DtypeMismatchError.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DtypeMismatchError(f"{self.path}: {quoted(name)} is {info.dtype}; {_supported()}.")
        data = _aligned(info.nbytes)
        with _opened(self.path) as descriptor:
            whole = _read_at(descriptor, data.data, info.start)
            if not whole or _stamp(descriptor) != self._stamp:
                raise CorruptCheckpointError(f"{self.path}: changed while it was read; load it again.")
            if not cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, info.start, info.nbytes, os.POSIX_FADV_DONTNEED)
        return data.view(DTYPES[info.dtype]).reshape(info.shape)


def _aligned(size: int) -> np.ndarray:
    """Fresh bytes that begin at a multiple of 64, which JAX and TensorFlow take over without a copy."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def quoted(name: str) -> str:
    """A name out of a file, made safe and short for a message."""
    text = ascii(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(name)} characters)"


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row-major order."""
    return hashlib.sha256(_bytes(array)).hexdigest()


# Writing


def create(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Write the header of a file for name -> (dtype, shape); `write` then fills it, in any order.

    Order, spacing and padding are those of the safetensors library: the bytes are the same.
    """
    rank = {code: place for place, code in enumerate(DTYPES)}
    ordered = sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        files.write_at(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(descriptor, 8 + len(text) + end)
    finally:
        os.close(descriptor)
    del header["__metadata__"]
    return {name: _tensor_info(path, name, entry, 8 + len(text)) for name, entry in header.items()}


def write(info: TensorInfo, array: np.ndarray) -> str:
    """Put one tensor, of any strides, at its place and return its `digest`.

    Raises ShapeMismatchError or DtypeMismatchError if it is not what `create` was told.
    """
    if array.shape != info.shape:
        raise ShapeMismatchError(f"{quoted(info.name)}: {array.shape}, the config says {info.shape}.")
    if CODES.get(array.dtype) != info.dtype:
        raise DtypeMismatchError(f"{quoted(info.name)}: {array.dtype}, {info.dtype} was announced; cast it first.")
    data = _bytes(array)
    descriptor = os.open(info.file, os.O_WRONLY)
    try:
        files.write_at(descriptor, data, info.start)
    finally:
        os.close(descriptor)
    return hashlib.sha256(data).hexdigest()


# The header


def _read_header(path: Path, descriptor: int, size: int) -> tuple[bytes, int]:
    """The header's bytes and the offset of the data."""
    first = os.pread(descriptor, 256, 0)
    if first.startswith(b"version https://git-lfs"):
        raise CorruptCheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`.")
    if size < 8:
        raise TruncatedFileError(f"{path}: {size} bytes, at least 8 were expected; copy or download it again.")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES and first[:8].isascii() and first[:8].decode().isprintable():
        raise CorruptCheckpointError(f"{path}: text, not safetensors: it begins {first[:60]!a}.")
    if length > MAX_HEADER_BYTES:
        raise LimitExceededError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read.")
    if 8 + length > size:
        raise TruncatedFileError(f"{path}: {size} bytes, the header alone ends at {8 + length}; copy it again.")
    header = bytearray(length)
    _read_at(descriptor, memoryview(header), 8)
    return bytes(header), 8 + length


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The JSON object of a header, duplicates refused."""
    if not header.startswith(b"{"):
        raise CorruptCheckpointError(f"{path}: the header begins {header[:20]!a}, '{{' was expected.")
    # before parsing: a tensor has at most 7 commas, and the objects of a million would fill the memory
    if header.count(b",") > 10 * MAX_TENSORS:
        raise LimitExceededError(f"{path}: the header lists more than {MAX_TENSORS} tensors.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = collections.Counter(key for key, _ in pairs)
        twice = sorted(quoted(key) for key, count in counts.items() if count > 1)
        if twice:
            raise CorruptCheckpointError(f"{path}: the header holds {', '.join(twice[:20])} twice.")
        return dict(pairs)

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise CorruptCheckpointError(f"{path}: the header is not UTF-8 JSON ({cause}); copy it again.") from cause
    if len(entries) - ("__metadata__" in entries) > MAX_TENSORS:
        raise LimitExceededError(f"{path}: {len(entries)} tensors; at most {MAX_TENSORS} are read.")
    return entries


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise CorruptCheckpointError(f"{path}: __metadata__ is not a mapping of strings to strings.")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked by itself."""
    where = f"{path}: {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpointError(f"{where}: exactly dtype, shape and data_offsets were expected.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise DtypeMismatchError(f"{where}: dtype {quoted(str(dtype))} is unknown; {_supported()}.")
    if not (_is_naturals(shape) and _is_naturals(offsets) and len(offsets) == 2):
        raise CorruptCheckpointError(f"{where}: shape and data_offsets must be integers of 0 or more.")
    if len(shape) > MAX_RANK or math.prod(max(size, 1) for size in shape) * _BITS[dtype] >= 2**63:
        raise LimitExceededError(f"{where}: shape {str(shape)[:80]} is beyond rank {MAX_RANK} or 2^60 bytes.")
    start, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if 8 * (end - start) != bits:
        raise CorruptCheckpointError(
            f"{where}: bytes {start} to {end}, but {dtype} {shape} takes {bits / 8:g}; copy the file again."
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + end)


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, infos: list[TensorInfo], start: int, size: int) -> None:
    """The tensors cover the data once, without hole, overlap or rest."""
    position, before = start, "the header"
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != position:
            fault = "overlaps" if info.start < position else "leaves a hole after"
            raise CorruptCheckpointError(f"{path}: {quoted(info.name)} {fault} {before}; copy the file again.")
        position, before = info.end, quoted(info.name)
    if position > size:
        raise TruncatedFileError(f"{path}: {size} bytes, {position} were expected; copy or download it again.")
    if position < size:
        raise CorruptCheckpointError(f"{path}: {size - position} bytes belong to no tensor; copy the file again.")


# Bytes


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file; a FIFO or a device neither blocks nor is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as cause:
        raise CheckpointNotFoundError(errno.ENOENT, f"{path}: no such file; check the path.") from cause
    except OSError as cause:
        raise CheckpointError(cause.errno, f"{path}: cannot be opened ({cause.strerror}).") from cause
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnsafeFileError(f"{path}: not a regular file; a safetensors file was expected.")
        yield descriptor
    except OSError as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(cause.errno, f"{path}: cannot be read ({cause.strerror}).") from cause
    finally:
        os.close(descriptor)


def _stamp(descriptor: int) -> tuple[int, int, int, int]:
    """What changes when a file does; its size stands third."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_at(descriptor: int, view: memoryview, offset: int) -> bool:
    """Fill a buffer from an offset; False if the file ends before."""
    while view:
        count = os.preadv(descriptor, [view[: 1 << 30]], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes in row-major order; bfloat16 has no buffer of its own, so it is viewed as uint8."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _supported() -> str:
    return f"weights are read as {', '.join(DTYPES)}"
