"""One GGUF file, made and understood; quantised tensors are read as float32."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ....disk import files, reading
from ....disk.reading import opened
from ..tensor_file import TensorFile, TensorInfo, refuse_pointer, reserve, stamp_of
from .kinds import KINDS, QUANTISED, dequantised, nbytes
from .scan import ARRAY, BOOL, CODES, DEFAULT_ALIGNMENT, MAGIC, STRING, Scan, Strings, Value


class GgufFile(TensorFile):
    """A scanned header: `values` of its keys and, by `read`, its tensors."""

    values: Mapping[str, Value]

    def __init__(self, path: files.PathLike) -> None:
        """Scan the header.

        Raises CheckpointNotFoundError, TruncatedFileError, CorruptCheckpointError, LimitExceededError,
        UnsupportedFeatureError (another version, big-endian), DtypeMismatchError (an unknown type), UnsafeFileError,
        CheckpointError (with the system's errno).
        """
        self.path = reading.as_path(path)
        with opened(self.path) as descriptor:
            self.stamp = stamp_of(descriptor)
            scan = Scan(self.path, descriptor, self.stamp[2])
            refuse_pointer(self.path, scan.peek())
            self.values, self.tensors = scan.header()
        self.metadata = {key: value for key, value in self.values.items() if isinstance(value, str)}

    def read(self, name: str, rows: slice | None = None, *, cached: bool = True) -> np.ndarray:
        """A fresh array of one tensor or of its rows, of quantised ones as float32.

        Raises what `TensorFile.read` raises, MissingExtraError, UnsupportedFeatureError (nothing can dequantise it).
        """
        info = self.tensors[name]
        if info.dtype not in QUANTISED:
            return super().read(name, rows, cached=cached)
        array = dequantised(self.read_bytes(name, cached=cached), info)
        return array if rows is None else array[rows]


# Writing


def create(
    path: Path, values: Mapping[str, Value | Sequence[str]], specs: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, TensorInfo]:
    """Write the header of a file for keys and for name -> (dtype, shape); `tensor_file.write_bytes` then fills it."""
    head = MAGIC + struct.pack("<IQQ", 3, len(specs), len(values))
    head += b"".join(_string(key) + _encoded(value) for key, value in values.items())
    offset, offsets = 0, {}
    for name, (code, shape) in specs.items():
        offsets[name] = offset
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += _string(name) + sizes + struct.pack("<IQ", KINDS[code].number, offset)
        offset = _aligned(offset + nbytes(code, shape))
    start = _aligned(len(head))
    reserve(path, head, start + offset)
    return {
        name: TensorInfo(name, code, shape, path, start + offsets[name], start + offsets[name] + nbytes(code, shape))
        for name, (code, shape) in specs.items()
    }


def _aligned(offset: int) -> int:
    return offset + -offset % DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value | Sequence[str]) -> bytes:
    """The type of a value and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, np.generic):
        return struct.pack("<I", CODES[value.dtype]) + value.tobytes()
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, CODES[value.dtype], len(value)) + value.tobytes()
    texts = value.decoded() if isinstance(value, Strings) else value
    return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(map(_string, texts))
