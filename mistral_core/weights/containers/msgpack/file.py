"""Flax' msgpack files: a nested map whose leaves are arrays, walked without reading an array.

A leaf is an extension of type 1 that holds the array (shape, dtype name, bytes); an array beyond 2^30 bytes is a map of
chunks. The msgpack library cannot pass over a value without reading it, hence the walk here; the format is that of
https://github.com/msgpack/msgpack/blob/master/spec.md and flax.serialization.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

from ....disk import files, limits, reading
from ....disk.reading import opened
from ....errors import CorruptCheckpointError, DtypeMismatchError, LimitExceededError, TruncatedFileError
from ..tensor_file import (
    DTYPES,
    MAX_RANK,
    MAX_TENSORS,
    TensorFile,
    TensorInfo,
    quoted,
    refuse_pointer,
    stamp_of,
    supported,
)

MAX_DEPTH = limits.CONTAINER_DEPTH
MAX_NAME = limits.NAME_BYTES
CHUNKED = "__msgpack_chunked_array__"

ARRAY = 1  # the extension type
_BY_NAME = {dtype.name: code for code, dtype in DTYPES.items()}
_BUFFER = 4096

# first byte -> (kind, bytes of the length that follows)
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}


class MsgpackFile(TensorFile):
    """A walked tree and, by `read`, its arrays; a name is the path joined by slashes."""

    def __init__(self, path: files.PathLike) -> None:
        """Walk the tree.

        Raises CheckpointNotFoundError, TruncatedFileError, CorruptCheckpointError, UnsafeFileError,
        LimitExceededError, DtypeMismatchError, CheckpointError (with the system's errno).
        """
        self.path = reading.as_path(path)
        self.metadata: dict[str, str] = {}
        with opened(self.path) as descriptor:
            self.stamp = stamp_of(descriptor)
            walk = _Walk(self.path, descriptor, self.stamp[2])
            refuse_pointer(self.path, walk.peek())
            found: dict[str, TensorInfo] = {}
            walk.tree((), found)
            if walk.at != walk.size:
                raise CorruptCheckpointError(
                    f"{self.path}: {walk.size - walk.at} bytes after the tree; copy the file again."
                )
        self.tensors = found


class _Walk:
    """A position in a file, and the values that begin there."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size, self.at = path, descriptor, size, 0
        self._start, self._buffer, self.keys = 0, b"", 0

    def peek(self) -> bytes:
        """The bytes that come next, not taken."""
        return os.pread(self.descriptor, 64, self.at)

    def tree(self, path: tuple[str, ...], found: dict[str, TensorInfo]) -> None:
        """A map of maps and arrays."""
        if len(path) > MAX_DEPTH:
            raise LimitExceededError(f"{self.path}: nested deeper than {MAX_DEPTH} levels.")
        for key in self._keys("/".join(path) or "the tree"):
            if key == CHUNKED:
                raise self._bad(f"{quoted('/'.join(path))} holds {CHUNKED} behind other keys")
            name = "/".join((*path, key))
            before = self.at
            kind, length = self._header()
            if kind == "ext":
                found[name] = self._array(name, length)
            elif kind == "map" and self._is_chunked(length):
                found[name] = self._chunked(name)
            elif kind == "map":
                self.at = before
                self.tree((*path, key), found)
            else:
                raise self._bad(f"{quoted(name)} must be a map or an array, got {kind}")
            if len(found) > MAX_TENSORS:
                raise LimitExceededError(f"{self.path}: more than {MAX_TENSORS} tensors.")

    def _keys(self, where: str) -> Any:
        """The keys of a map, one at a time; the caller takes each value before it asks for the next."""
        kind, count = self._header()
        if kind != "map":
            raise self._bad(f"{where} must be a map, got {kind}")
        seen: set[str] = set()
        for _ in range(count):
            key = self._text()
            if key in seen:
                raise self._bad(f"{where} holds {quoted(key)} twice")
            seen.add(key)
            self.keys += 1
            limits.check(self.keys, limits.TREE_KEYS, what="keys in the tree", where=str(self.path))
            yield key

    def _is_chunked(self, entries: int) -> bool:
        """Whether a map that was just begun describes an array in chunks; its position is then behind the mark."""
        at = self.at
        if entries == 3 and self._header()[0] == "str":
            self.at = at
            if self._text() == CHUNKED:
                if self._header() != ("true", 0):
                    raise self._bad(f"{CHUNKED} is not true")
                return True
        self.at = at
        return False

    def _chunked(self, name: str) -> TensorInfo:
        """An array in chunks of one dimension, numbered from 0."""
        self._expect("shape")
        shape = [self._integer() for key in self._numbered(name)]
        self._expect("chunks")
        pieces = []
        for key in self._numbered(name):
            kind, length = self._header()
            if kind != "ext":
                raise self._bad(f"chunk {key} of {quoted(name)} must be an array, got {kind}")
            pieces.append(self._array(name, length))
        extents = [extent for piece in pieces for extent in piece.extents]
        dtypes = {piece.dtype for piece in pieces}
        if len(dtypes) != 1 or any(len(piece.shape) != 1 for piece in pieces):
            raise self._bad(f"the chunks of {quoted(name)} are not one array")
        self._check_shape(name, shape)
        code = dtypes.pop()
        size = sum(end - start for start, end in extents)
        if math.prod(shape) * DTYPES[code].itemsize != size:
            raise self._bad(f"the chunks of {quoted(name)} hold {size} bytes, its shape is {shape}")
        (start, end), *more = extents
        return TensorInfo(name, code, tuple(shape), self.path, start, end, tuple(more))

    def _numbered(self, name: str) -> Any:
        for number, key in enumerate(self._keys(name)):
            if key != str(number):
                raise self._bad(f"the key in {quoted(name)} must be {number}, got {quoted(key)}")
            yield key

    def _array(self, name: str, length: int) -> TensorInfo:
        """The payload of an extension, up to its last byte."""
        end = self._end(length)
        kind, count = self._header()
        if (kind, count) != ("array", 3):
            raise self._bad(f"{quoted(name)} must be (shape, dtype, bytes), got {kind} of {count}")
        kind, rank = self._header()
        if kind != "array" or rank > MAX_RANK:
            raise self._bad(f"the shape of {quoted(name)} must be at most {MAX_RANK} sizes, got {kind} of {rank}")
        shape = [self._integer() for _ in range(rank)]
        dtype = self._text()
        if dtype not in _BY_NAME:
            raise DtypeMismatchError(f"{self.path}: {quoted(name)} is {quoted(dtype)}; {supported()}.")
        kind, size = self._header()
        code = _BY_NAME[dtype]
        self._check_shape(name, shape)
        if kind != "bin" or math.prod(shape) * DTYPES[code].itemsize != size or self.at + size != end:
            raise self._bad(f"{quoted(name)} must be {dtype} {shape}, got {kind} of {size} bytes")
        self.at = end
        return TensorInfo(name, code, tuple(shape), self.path, end - size, end)

    def _check_shape(self, name: str, shape: list[int]) -> None:
        if len(shape) > MAX_RANK or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise LimitExceededError(f"{self.path}: {quoted(name)} has the shape {str(shape)[:80]}.")

    def _expect(self, key: str) -> None:
        found = self._text()
        if found != key:
            raise self._bad(f"a key must be {key!r}, got {quoted(found)}")

    def _text(self) -> str:
        kind, length = self._header()
        if kind != "str" or length > MAX_NAME:
            raise self._bad(f"a key must be a name of at most {MAX_NAME} bytes, got {kind} of {length}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as cause:
            raise self._bad("a name is not UTF-8") from cause

    def _integer(self) -> int:
        first = self._take(1)[0]
        if first < 0x80:
            return first
        if first not in _INTEGERS:
            raise self._bad(f"a size must be 0 or more, got byte {first:#x}")
        layout = _INTEGERS[first]
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _header(self) -> tuple[str, int]:
        """What begins here and how long it is; only what Flax writes."""
        first = self._take(1)[0]
        for low, high, kind in ((0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "str")):
            if low <= first <= high:
                return kind, first - low
        if first == 0xC3:
            return "true", 0
        if first in FIXED_EXT:
            return self._extension(FIXED_EXT[first])
        if first not in _SIZED:
            raise self._bad(f"byte {first:#x}, which Flax does not write")
        kind, size = _SIZED[first]
        length = int.from_bytes(self._take(size), "big")
        return self._extension(length) if kind == "ext" else (kind, length)

    def _extension(self, length: int) -> tuple[str, int]:
        number = self._take(1)[0]
        if number != ARRAY:
            raise self._bad(f"an extension must be an array ({ARRAY}), got {number}")
        return "ext", length

    def _take(self, count: int) -> bytes:
        self._end(count)
        offset = self.at - self._start
        if offset < 0 or offset + count > len(self._buffer):
            self._start, offset = self.at, 0
            self._buffer = os.pread(self.descriptor, max(_BUFFER, count), self.at)
        self.at += count
        return self._buffer[offset : offset + count]

    def _end(self, count: int) -> int:
        """Where `count` bytes end, if the file has them."""
        if self.at + count > self.size:
            raise TruncatedFileError(
                f"{self.path} must have {self.at + count} bytes, got {self.size}; copy or download it again."
            )
        return self.at + count

    def _bad(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.path}: before byte {self.at}: {what}; copy the file again.")
