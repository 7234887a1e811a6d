"""One safetensors file: a strict check of its header, made and understood.

Not by the library: it maps a file, knows no limit of ours, and in release 0.8.0 writes wrong bytes of an array that is
not contiguous. The tests read and write each file with both.
"""

from __future__ import annotations

import collections
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...disk import files, limits, reading
from ...disk.reading import opened
from ...errors import CorruptCheckpointError, DtypeMismatchError, LimitExceededError, TruncatedFileError
from .tensor_file import (
    DTYPES,
    MAX_RANK,
    MAX_TENSORS,
    STORED,
    TensorFile,
    TensorInfo,
    quoted,
    read_at,
    refuse_pointer,
    reserve,
    stamp_of,
    supported,
)

MAX_HEADER_BYTES = limits.SAFETENSORS_HEADER_BYTES

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


class SafetensorsFile(TensorFile):
    """A checked header and, by `read`, its tensors."""

    def __init__(self, path: files.PathLike) -> None:
        """Check the header.

        Raises CheckpointNotFoundError, TruncatedFileError, CorruptCheckpointError, UnsafeFileError,
        LimitExceededError, DtypeMismatchError (an unknown dtype), CheckpointError (with the system's errno).
        """
        self.path = reading.as_path(path)
        with opened(self.path) as descriptor:
            self.stamp = stamp_of(descriptor)
            size = self.stamp[2]
            header, start = _read_header(self.path, descriptor, size)
            entries = _parse(self.path, header)
            self.metadata: dict[str, str] = _metadata(self.path, entries.pop("__metadata__", {}))
            infos = [_tensor_info(self.path, name, entry, start) for name, entry in entries.items()]
            _check_layout(self.path, infos, start, size)
            self.tensors = {info.name: info for info in infos}


# Writing


def create(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, framework: str = "pt"
) -> dict[str, TensorInfo]:
    """Write the header of a file for name -> (dtype, shape); `tensor_file.write` then fills it, in any order.

    Order, spacing and padding are those of the safetensors library: the bytes are the same.
    """
    rank = {code: place for place, code in enumerate(STORED)}
    ordered = sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": framework}}
    end = 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    reserve(path, len(text).to_bytes(8, "little") + text, 8 + len(text) + end)
    del header["__metadata__"]
    return {name: _tensor_info(path, name, entry, 8 + len(text)) for name, entry in header.items()}


# The header


def _read_header(path: Path, descriptor: int, size: int) -> tuple[bytes, int]:
    """The header's bytes and the offset of the data."""
    first = os.pread(descriptor, 256, 0)
    refuse_pointer(path, first)
    if size < 8:
        raise TruncatedFileError(f"{path} must have at least 8 bytes, got {size}; copy or download it again.")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES and first[:8].isascii() and first[:8].decode().isprintable():
        raise CorruptCheckpointError(f"{path}: text, not safetensors: it begins {first[:60]!a}.")
    if length > MAX_HEADER_BYTES:
        raise LimitExceededError(f"{path}: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read.")
    if 8 + length > size:
        raise TruncatedFileError(f"{path}: {size} bytes, the header alone ends at {8 + length}; copy it again.")
    header = bytearray(length)
    read_at(descriptor, memoryview(header), 8)
    return bytes(header), 8 + length


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The JSON object of a header, duplicates refused."""
    if not header.startswith(b"{"):
        raise CorruptCheckpointError(f"{path}: the header must begin with '{{', got {header[:20]!a}.")
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
        raise CorruptCheckpointError(f"{where} must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise DtypeMismatchError(f"{where}: dtype {quoted(str(dtype))} is unknown; {supported()}.")
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
        raise TruncatedFileError(f"{path} must have {position} bytes, got {size}; copy or download it again.")
    if position < size:
        raise CorruptCheckpointError(f"{path}: {size - position} bytes belong to no tensor; copy the file again.")
