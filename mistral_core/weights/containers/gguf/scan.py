"""The header of a GGUF file, scanned strictly and fast; nothing is believed before it is compared with the file.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: keys and values, then tensors with
their sizes in reverse, then the numbers, each tensor at a multiple of the alignment. The package gguf maps a file and
believes what its header says.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ....disk import limits
from ....errors import (
    CorruptCheckpointError,
    DtypeMismatchError,
    LimitExceededError,
    TruncatedFileError,
    UnsupportedFeatureError,
)
from ..tensor_file import MAX_RANK, MAX_TENSORS, TensorInfo, quoted
from .kinds import BY_NUMBER, KINDS, nbytes

MAX_HEADER_BYTES = limits.GGUF_HEADER_BYTES
MAX_KEYS = limits.GGUF_KEYS
MAX_ITEMS = limits.GGUF_ITEMS
MAX_NAME = limits.NAME_BYTES
MAX_ALIGNMENT = limits.GGUF_ALIGNMENT
ALIGNMENT = "general.alignment"

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

SCALARS = {
    code: np.dtype(layout)
    for code, layout in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
CODES = {dtype: code for code, dtype in SCALARS.items()}
BOOL, STRING, ARRAY = 7, 8, 9


class Strings(NamedTuple):
    """An array of strings as it stands in the header."""

    length: int
    data: bytes

    def decoded(self) -> list[str]:
        """The strings; raises CorruptCheckpointError where one is not UTF-8."""
        found, at, data = [], 0, self.data
        try:
            for _ in range(self.length):
                end = at + 8 + int.from_bytes(data[at : at + 8], "little")
                found.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError as cause:
            raise CorruptCheckpointError(f"string {len(found)} of a GGUF array is not UTF-8; copy the file.") from cause
        return found


Value = str | bool | np.generic | np.ndarray | Strings
"""Of a key; the width of a number is that of its NumPy type."""


class Scan:
    """A position in a header, and the values that begin there."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size, self.at = path, descriptor, size, 0
        self.buffer = bytearray(os.pread(descriptor, 1 << 18, 0))

    def peek(self) -> bytes:
        """The first bytes."""
        return bytes(self.buffer[:256])

    def header(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        """Values by key and tensors by name."""
        if self._take(4) != MAGIC:
            raise self._bad(f"the file must begin with {MAGIC!a}, got {self.peek()[:20]!a}")
        version = self._number("<I")
        if version not in _VERSIONS:
            order = "big-endian, " if version and version % 2**24 == 0 else ""
            raise UnsupportedFeatureError(
                f"{self.path}: {order}version {version} of GGUF; little-endian 2 and 3 are read: convert it again."
            )
        tensors, keys = self._count("tensors", MAX_TENSORS), self._count("keys", MAX_KEYS)
        values: dict[str, Value] = {}
        for _ in range(keys):
            self._put(values, self._text(MAX_NAME), self._value(self._number("<I")))
        entries: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for _ in range(tensors):
            name = self._text(MAX_NAME)
            self._put(entries, name, self._entry(name))
        alignment = self._alignment(values)
        start = self.at + -self.at % alignment
        infos = {name: self._info(name, *entry, start, alignment) for name, entry in entries.items()}
        self._check_layout(list(infos.values()), start, alignment)
        return values, infos

    def _put(self, found: dict[str, Any], name: str, value: Any) -> None:
        if name in found:
            raise self._bad(f"{quoted(name)} appears twice")
        found[name] = value

    def _count(self, what: str, limit: int) -> int:
        count = self._number("<Q")
        if count > limit:
            raise LimitExceededError(f"{self.path}: {count} {what}; at most {limit} are read.")
        return count

    def _value(self, code: int) -> Value:
        if code in SCALARS:
            return np.frombuffer(self._take(SCALARS[code].itemsize), SCALARS[code])[0]
        if code == BOOL:
            byte = self._take(1)[0]
            if byte > 1:
                raise self._bad(f"a truth value must be 0 or 1, got {byte}")
            return bool(byte)
        if code == STRING:
            return self._text(MAX_HEADER_BYTES)
        if code == ARRAY:
            return self._array(self._number("<I"), self._number("<Q"))
        raise self._bad(f"the type of a value must be 0 to 12, got {code}")

    def _array(self, code: int, count: int) -> Value:
        width = 8 if code == STRING else 1 if code == BOOL else SCALARS[code].itemsize if code in SCALARS else None
        if width is None:
            raise self._bad(f"an array must be of numbers or strings, got one of type {code}")
        if count > MAX_ITEMS:
            raise LimitExceededError(f"{self.path}: an array of {count} values; at most {MAX_ITEMS} are read.")
        if code == STRING:
            return self._strings(count)
        return np.frombuffer(self._take(width * count), "?" if code == BOOL else SCALARS[code])

    def _strings(self, count: int) -> Strings:
        """Only stepped over: a vocabulary of 131072 tokens costs milliseconds."""
        first, at, filled = self.at, self.at, len(self.buffer)
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > filled:
                filled = self._fill(at + 8)
            at += 8 + length(self.buffer, at)[0]
        self._fill(at)
        self.at = at
        return Strings(count, bytes(self.buffer[first:at]))

    def _entry(self, name: str) -> tuple[tuple[int, ...], str, int]:
        """Shape, dtype code and offset of a tensor."""
        rank = self._number("<I")
        if not 1 <= rank <= MAX_RANK:
            raise LimitExceededError(f"{self.path}: {quoted(name)} has {rank} dimensions; 1 to {MAX_RANK} are read.")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        if number not in BY_NUMBER:
            raise DtypeMismatchError(
                f"{self.path}: {quoted(name)} is of type {number}, unknown or removed; {', '.join(KINDS)} are read."
            )
        return shape, BY_NUMBER[number], offset

    def _alignment(self, values: Mapping[str, Value]) -> int:
        value = values.get(ALIGNMENT, np.uint32(DEFAULT_ALIGNMENT))
        found = int(value) if isinstance(value, np.integer) else 0
        if found.bit_count() != 1 or not 0 < found <= MAX_ALIGNMENT:
            raise self._bad(f"{ALIGNMENT} must be a power of two up to {MAX_ALIGNMENT}, got {str(value)[:40]!a}")
        return found

    def _info(
        self, name: str, shape: tuple[int, ...], code: str, offset: int, start: int, alignment: int
    ) -> TensorInfo:
        where = f"{self.path}: {quoted(name)}"
        if math.prod(max(size, 1) for size in shape) >= 2**60:
            raise LimitExceededError(f"{where}: shape {str(shape)[:80]} is beyond 2^60 values.")
        if 0 in shape or shape[-1] % KINDS[code].values:
            raise CorruptCheckpointError(
                f"{where}: rows of {code} must be blocks of {KINDS[code].values}, got {list(shape)}; copy it again."
            )
        if offset % alignment:
            raise CorruptCheckpointError(f"{where}: offset {offset} is no multiple of {alignment}; copy it again.")
        return TensorInfo(name, code, shape, self.path, start + offset, start + offset + nbytes(code, shape))

    def _check_layout(self, infos: list[TensorInfo], start: int, alignment: int) -> None:
        """The tensors follow each other, each from the next multiple of the alignment on, to the end of the file."""
        position, before = start, "the header"
        for info in sorted(infos, key=lambda info: info.start):
            if info.start != position + -position % alignment:
                fault = "overlaps" if info.start < position else "leaves a hole after"
                raise self._bad(f"{quoted(info.name)} {fault} {before}")
            position, before = info.end, quoted(info.name)
        if infos and position > self.size:
            raise self._short(position)
        if infos and self.size - position >= alignment:
            raise self._bad(f"{self.size - position} bytes at the end belong to no tensor")

    def _text(self, limit: int) -> str:
        length = self._number("<Q")
        if length > limit:
            raise LimitExceededError(f"{self.path}: a string of {length} bytes; at most {limit} are read here.")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as cause:
            raise self._bad("a string that is not UTF-8") from cause

    def _number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.buffer):
            self._fill(end)
        self.at = end
        return bytes(self.buffer[end - count : end])

    def _fill(self, end: int) -> int:
        """Read on, at least up to `end`; how much is there then."""
        if end > self.size:
            raise self._short(end)
        if end > MAX_HEADER_BYTES:
            raise LimitExceededError(f"{self.path}: a header beyond {MAX_HEADER_BYTES} bytes.")
        while len(self.buffer) < end:
            more = os.pread(self.descriptor, min(len(self.buffer), MAX_HEADER_BYTES), len(self.buffer))
            if not more:
                raise self._short(end)
            self.buffer += more
        return len(self.buffer)

    def _short(self, end: int) -> TruncatedFileError:
        return TruncatedFileError(f"{self.path} must have {end} bytes, got {self.size}; copy or download it again.")

    def _bad(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.path}: before byte {self.at}: {what}; copy the file again.")
