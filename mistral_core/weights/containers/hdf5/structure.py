"""What an HDF5 file of weights is made of, parsed strictly: groups, and in them contiguous datasets.

The HDF5 library hangs on a file with a flipped bit, or crashes (issues 1707 of HDFGroup/hdf5, 1183 of h5py), so it
never sees one that it did not write here. The layout is that of `h5py.File(path, "w")`, which Keras and transformers
use: superblock 0, object headers 1, groups as symbol tables (HDF5 File Format Specification 3.0). Everything else is
refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ....disk import limits
from ....errors import (
    CheckpointError,
    CorruptCheckpointError,
    LimitExceededError,
    TruncatedFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from ..tensor_file import MAX_TENSORS, quoted, read_at, refuse_pointer
from . import messages
from .messages import Dataset

MAX_OBJECTS = MAX_TENSORS
MAX_DEPTH = limits.CONTAINER_DEPTH
MAX_NAME = limits.NAME_BYTES
MAX_BYTES = limits.HDF5_BYTES
"""What is read of a file besides its numbers."""

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = 96


class Found(NamedTuple):
    """A group or a dataset."""

    path: str
    """Names joined by slashes; the root's is empty."""
    attributes: dict[str, tuple[str, ...]]
    """Those of text; a single one is a tuple of one."""
    dataset: Dataset | None


class Structure:
    """The objects of an HDF5 file that lies in an opened file, `size` bytes from `start` on."""

    def __init__(self, path: Path, descriptor: int, start: int, size: int) -> None:
        self.path, self.descriptor, self.start, self.size = path, descriptor, start, size
        self.taken: list[tuple[int, int]] = []
        """(start, end) of everything that is not numbers."""
        self._leaf = self._inner = 0  # half of what a node of each kind has room for
        self._budget = MAX_BYTES
        self._heaps: dict[int, dict[int, bytes]] = {}

    def objects(self) -> Iterator[Found]:
        """Every object once, the root first.

        Raises CorruptCheckpointError and its kinds, UnsafeFileError, LimitExceededError, UnsupportedFeatureError.
        """
        with self._named(""):
            waiting = [("", self._root(), 0)]
        seen = set()
        while waiting:
            path, address, depth = waiting.pop()
            if address in seen:
                raise UnsafeFileError(f"{self.path}: {quoted(path)} is an object that has another name too; refused.")
            seen.add(address)
            with self._named(path):
                found, members = self._object(path, address)
            prefix = f"{path}/" if path else ""
            waiting += [(prefix + name, place, depth + 1) for name, place in members.items()]
            if depth > MAX_DEPTH or len(seen) + len(waiting) > MAX_OBJECTS:
                raise LimitExceededError(
                    f"{self.path}: over {MAX_OBJECTS} objects or {MAX_DEPTH} groups in each other."
                )
            yield found

    @contextmanager
    def _named(self, path: str) -> Iterator[None]:
        """Say in an error which object of which file it is about."""
        where = f"{self.path}: {quoted(path or '/')}"
        try:
            yield
        except (CheckpointError, UnsupportedFeatureError) as error:
            raise type(error)(f"{where}: {error}") from error
        except (struct.error, ValueError, IndexError) as cause:
            raise CorruptCheckpointError(f"{where}: cut off or not text ({cause}); copy the file again.") from cause

    def _take(self, offset: int, size: int, mark: bytes = b"") -> bytes:
        """A piece of structure that begins with a mark."""
        if offset + size > self.size:
            raise CorruptCheckpointError(f"bytes {offset} to {offset + size} lie beyond the end; copy the file again.")
        self._budget -= size
        if self._budget < 0:
            raise LimitExceededError(f"more than {MAX_BYTES} bytes besides the numbers.")
        piece = bytearray(size)
        read_at(self.descriptor, memoryview(piece), self.start + offset)
        if not piece.startswith(mark):
            raise CorruptCheckpointError(f"{mark!a} must be at {offset}, got {bytes(piece[:4])!a}; copy it again.")
        self.taken.append((offset, offset + size))
        return bytes(piece)

    def _root(self) -> int:
        """The address of the root's header."""
        first = self._take(0, min(_SUPERBLOCK, self.size))
        refuse_pointer(self.path, first)
        if len(first) < _SUPERBLOCK:
            raise TruncatedFileError(f"it must have at least {_SUPERBLOCK} bytes, got {self.size}; copy it again.")
        if not first.startswith(_SIGNATURE):
            raise CorruptCheckpointError(f"not HDF5: it begins {first[:8]!a}; copy or download it again.")
        self._leaf, self._inner = struct.unpack_from("<HH", first, 16)
        base, _, end, driver, _, root = struct.unpack_from("<6Q", first, 24)
        if first[8] != 0 or first[13:15] != b"\x08\x08" or base != 0 or driver != messages.NOWHERE:
            raise _other(f"superblock {first[8]}")
        if end > self.size:
            raise TruncatedFileError(f"{self.size} bytes, its beginning says {end}; copy or download it again.")
        if end < self.size:
            raise CorruptCheckpointError(f"{self.size} bytes, its beginning says {end}; copy or download it again.")
        return int(root)

    def _object(self, path: str, address: int) -> tuple[Found, dict[str, int]]:
        """An object, and name -> address of the members of a group."""
        listed = self._messages(address)
        texts = [messages.attribute(data, self._heap) for kind, data in listed if kind == messages.ATTRIBUTE]
        one = dict(listed)
        if messages.LAYOUT in one:
            dataset = messages.dataset(one)
            if dataset.end > self.size:
                raise TruncatedFileError(f"{self.size} bytes, its numbers end at {dataset.end}; copy it again.")
            return Found(path, dict(texts), dataset), {}
        if any(kind == messages.LINK and data[1] & 8 and data[2] for kind, data in listed):
            raise UnsafeFileError("holds a link to another place or file; refused.")
        if messages.SYMBOL_TABLE not in one:
            raise _other("this kind of object")
        return Found(path, dict(texts), None), self._members(*struct.unpack_from("<QQ", one[messages.SYMBOL_TABLE]))

    def _messages(self, address: int) -> list[tuple[int, bytes]]:
        """(kind, content) of the messages in an object's header."""
        header = self._take(address, 16)
        version, count, size = struct.unpack_from("<BxHxxxxI", header)
        if version != 1:
            raise _other(f"a header that begins {header[:4]!a}")
        blocks: list[tuple[int, int]] = [(address + 16, size)]
        found: list[tuple[int, bytes]] = []
        for start, length in blocks:  # which grow
            block, at = self._take(start, length), 0
            while at < length and len(found) < count:
                kind, used, flags = struct.unpack_from("<HHB", block, at)
                content, at = block[at + 8 : at + 8 + used], at + 8 + used
                if at > length or (flags & 2 and kind in (messages.SPACE, messages.TYPE, messages.ATTRIBUTE)):
                    raise CorruptCheckpointError("a message is cut off or another object's; copy the file again.")
                if kind == messages.CONTINUATION:
                    blocks.append(struct.unpack("<QQ", content))
                found.append((kind, content))
        if len(found) != count:
            raise CorruptCheckpointError(f"{len(found)} of {count} messages; copy the file again.")
        return found

    def _members(self, tree: int, heap: int) -> dict[str, int]:
        """Name -> address of the members of a group."""
        size, _, data = struct.unpack_from("<QQQ", self._take(heap, 32, b"HEAP"), 8)
        names = self._take(data, size)
        members: dict[str, int] = {}
        for entry in self._entries(tree, 8):
            where, address, kind = struct.unpack_from("<QQI", entry)
            name = names[where : names.index(b"\0", where, where + MAX_NAME)].decode()
            if kind not in (0, 1):
                raise UnsafeFileError(f"{quoted(name)} in it is a link to another place; refused.")
            if name in members or name in ("", ".", "..") or "/" in name or len(members) == MAX_OBJECTS:
                raise CorruptCheckpointError(f"{quoted(name)} in it is there twice or no name; copy the file again.")
            members[name] = address
        return members

    def _entries(self, address: int, depth: int) -> Iterator[bytes]:
        """The 40 bytes of each member in a tree of symbol tables, every node of which is deeper than its parent."""
        node = self._take(address, 32 + 32 * self._inner, b"TREE\0")  # the places of the unused too
        level, used = node[5], struct.unpack_from("<H", node, 6)[0]
        if level >= depth:
            raise CorruptCheckpointError(f"a tree of level {level}; copy the file again.")
        for child in struct.unpack_from(f"<{2 * used + 1}Q", node, 24)[1::2]:
            if level:
                yield from self._entries(child, level)
                continue
            table = self._take(child, 8 + 80 * self._leaf, b"SNOD\1")
            count = struct.unpack_from("<H", table, 6)[0]
            yield from (table[at : at + 40] for at in range(8, 8 + 40 * count, 40))

    def _heap(self, address: int) -> dict[int, bytes]:
        """Index -> content of everything in the global heap at an address."""
        if address not in self._heaps:
            size = struct.unpack_from("<Q", self._take(address, 16, b"GCOL\1"), 8)[0]
            heap, at = self._take(address, size), 16
            found = self._heaps[address] = {}
            while at + 16 <= size and (index := heap[at] + 256 * heap[at + 1]):  # 0: the rest is free
                length = struct.unpack_from("<Q", heap, at + 8)[0]
                found[index] = heap[at + 16 : at + 16 + length]
                at += 16 + length + -length % 8
        return self._heaps[address]


def _other(what: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"{what} is not what h5py writes by default; re-save it with h5py.File(path, 'w').")
