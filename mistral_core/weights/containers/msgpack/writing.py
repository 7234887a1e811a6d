"""Flax' msgpack files, made: the headers are written, and holes are left where the numbers go."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....disk import files
from ..tensor_file import DTYPES, TensorInfo, reserve
from .file import ARRAY, CHUNKED, FIXED_EXT

CHUNK_BYTES = 1 << 30
"""The largest array that is not cut into chunks."""


def create(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Write the tree of a file for path joined by slashes -> (dtype, shape); `tensor_file.write` then fills it."""
    tree: dict[str, Any] = {}
    for name, spec in tensors.items():
        *parents, leaf = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = (name, *spec)
    infos: dict[str, TensorInfo] = {}
    written = _Writer(path, infos)
    reserve(path, b"", 0)
    with files.opened_to_write(path) as written.descriptor:
        written.tree(tree)
        os.ftruncate(written.descriptor, written.at)
    return {name: infos[name] for name in tensors}


class _Writer:
    """A tree as bytes, with holes where the numbers go."""

    descriptor: int

    def __init__(self, path: Path, infos: dict[str, TensorInfo]) -> None:
        self.path, self.infos, self.at = path, infos, 0

    def tree(self, node: Mapping[str, Any]) -> None:
        self._put(_map(len(node)))
        for key, value in sorted(node.items()):  # as Flax does, whose bytes these are
            self._put(_str(key))
            if isinstance(value, dict):
                self.tree(value)
            else:
                self._leaf(*value)

    def _leaf(self, name: str, code: str, shape: tuple[int, ...]) -> None:
        itemsize = DTYPES[code].itemsize
        count = math.prod(shape)
        if count * itemsize <= CHUNK_BYTES:
            extents = [self._array(code, shape)]
        else:
            self._put(_map(3) + _str(CHUNKED) + b"\xc3" + _str("shape") + _map(len(shape)))
            for axis, size in enumerate(shape):
                self._put(_str(str(axis)) + _int(size))
            step = CHUNK_BYTES // itemsize
            starts = range(0, count, step)
            self._put(_str("chunks") + _map(len(starts)))
            extents = []
            for number, start in enumerate(starts):
                self._put(_str(str(number)))
                extents.append(self._array(code, (min(step, count - start),)))
        (start, end), *more = extents
        self.infos[name] = TensorInfo(name, code, shape, self.path, start, end, tuple(more))

    def _array(self, code: str, shape: tuple[int, ...]) -> tuple[int, int]:
        size = math.prod(shape) * DTYPES[code].itemsize
        head = b"\x93" + bytes([0x90 + len(shape)]) + b"".join(map(_int, shape)) + _str(DTYPES[code].name)
        head += _sized(size, {0xC4: 1, 0xC5: 2, 0xC6: 4})
        self._put(_extension(len(head) + size) + head)
        start = self.at
        self.at += size
        return start, self.at

    def _put(self, data: bytes) -> None:
        files.write_at(self.descriptor, data, self.at)
        self.at += len(data)


def _sized(length: int, widths: Mapping[int, int]) -> bytes:
    """The shortest of several headers, as the msgpack library takes it."""
    for first, width in widths.items():
        if length < 1 << (8 * width):
            return bytes([first]) + length.to_bytes(width, "big")
    raise ValueError(f"{length} bytes are beyond msgpack")


def _map(count: int) -> bytes:
    return bytes([0x80 + count]) if count < 16 else _sized(count, {0xDE: 2, 0xDF: 4})


def _str(text: str) -> bytes:
    data = text.encode()
    return (bytes([0xA0 + len(data)]) if len(data) < 32 else _sized(len(data), {0xD9: 1, 0xDA: 2, 0xDB: 4})) + data


def _int(value: int) -> bytes:
    return bytes([value]) if value < 128 else _sized(value, {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8})


def _extension(length: int) -> bytes:
    fixed = {size: first for first, size in FIXED_EXT.items()}
    head = bytes([fixed[length]]) if length in fixed else _sized(length, {0xC7: 1, 0xC8: 2, 0xC9: 4})
    return head + bytes([ARRAY])
