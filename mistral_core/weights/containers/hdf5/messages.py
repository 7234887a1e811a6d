"""The messages in the header of an HDF5 object: what a dataset holds and where, and attributes of text."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ....errors import CorruptCheckpointError, LimitExceededError, UnsafeFileError, UnsupportedFeatureError
from ..tensor_file import MAX_RANK

SPACE, TYPE, LINK, EXTERNAL, LAYOUT, FILTERS = 0x01, 0x03, 0x06, 0x07, 0x08, 0x0B
ATTRIBUTE, CONTINUATION, SYMBOL_TABLE = 0x0C, 0x10, 0x11
NOWHERE = 2**64 - 1

_FIXED, _FLOAT, _STRING, _OPAQUE, _VARIABLE = 0, 1, 3, 5, 9
_CLASSES = {2: "times", 3: "text", 4: "bit fields", 6: "compound", 7: "references", 8: "enumerated",
            9: "of variable length", 10: "arrays"}  # fmt: skip
_LAYOUTS = {0: "compact", 2: "chunked"}


def _float(size: int, exponent: int, mantissa: int, bias: int) -> bytes:
    """The description of a little-endian float, from its second byte on."""
    numbers = (0x20, 8 * size - 1, 0, size, 0, 8 * size, mantissa, exponent, 0, mantissa, bias)
    return struct.pack("<BBBIHHBBBBI", *numbers)


_FLOATS = {
    _float(2, 5, 10, 15): "F16",
    _float(4, 8, 23, 127): "F32",
    _float(8, 11, 52, 1023): "F64",
    _float(2, 8, 7, 127): "BF16",
}


class Dataset(NamedTuple):
    """Where the numbers of a dataset lie."""

    dtype: str
    """A code as those of `tensor_file.DTYPES`, V2 for two opaque bytes, or another that names no weights."""
    shape: tuple[int, ...]
    start: int
    end: int


def dataset(messages: Mapping[int, bytes]) -> Dataset:
    """What the messages of a dataset say; raises UnsafeFileError, UnsupportedFeatureError, CorruptCheckpointError."""
    version, layout = messages[LAYOUT][:2]
    if (version, layout) == (4, 3) or EXTERNAL in messages:
        raise UnsafeFileError("its numbers lie in another file; refused.")
    if version not in (3, 4) or layout != 1 or FILTERS in messages:
        kind = _LAYOUTS.get(layout, "compressed") if version in (3, 4) else "of an old layout"
        raise UnsupportedFeatureError(f"its numbers are {kind}; re-save it contiguously, without chunks.")
    if SPACE not in messages or TYPE not in messages:
        raise CorruptCheckpointError("a dataset without shape or type; copy the file again.")
    code, itemsize = _dtype(messages[TYPE])
    shape = _shape(messages[SPACE])
    start, size = struct.unpack_from("<QQ", messages[LAYOUT], 2)
    if len(shape) > MAX_RANK:
        raise LimitExceededError(f"rank {len(shape)}; at most {MAX_RANK} is read.")
    if start == NOWHERE or not math.prod(shape):
        raise CorruptCheckpointError("its numbers were never written; save the file again.")
    if size != math.prod(shape) * itemsize:
        raise CorruptCheckpointError(f"{size} bytes for {code} {str(shape)[:80]}; copy the file again.")
    return Dataset(code, shape, start, start + size)


def _dtype(data: bytes) -> tuple[str, int]:
    """(code, bytes of one number) of a type that holds numbers and nothing else."""
    kind, size = data[0] & 15, struct.unpack_from("<I", data, 4)[0]
    if kind == _FLOAT and data[1:20] in _FLOATS:
        return _FLOATS[data[1:20]], size
    if kind in (_FIXED, _FLOAT) and data[1] & 1:
        raise UnsupportedFeatureError("its numbers are big-endian; re-save it as little-endian.")
    if kind in (_FIXED, _FLOAT, _OPAQUE) and 0 < size <= 8:
        letter = {_FIXED: "I" if data[1] & 8 else "U", _FLOAT: "another F", _OPAQUE: "V"}[kind]
        return f"{letter}{size if kind == _OPAQUE else 8 * size}", size
    raise UnsafeFileError(f"it must be numbers, got {_CLASSES.get(kind, 'another type')}.")


def _shape(data: bytes) -> tuple[int, ...]:
    version, rank = data[:2]
    if version not in (1, 2) or rank > 32:
        raise CorruptCheckpointError(f"dataspace {version} of rank {rank}; copy the file again.")
    if version == 2 and data[3] == 2:
        return (0,)  # a null dataspace
    return struct.unpack_from(f"<{rank}Q", data, 8 if version == 1 else 4)


def attribute(data: bytes, heap: Callable[[int], Mapping[int, bytes]]) -> tuple[str, tuple[str, ...]]:
    """The name and the texts of an attribute, none if it holds something else.

    `heap` gives what the global heap at an address holds. Raises CorruptCheckpointError.
    """
    version, flags, *sizes = struct.unpack_from("<BBHHH", data)
    if version not in (1, 2, 3) or (version > 1 and flags):
        raise CorruptCheckpointError(f"attribute {version}; copy the file again.")
    at, pieces = 9 if version == 3 else 8, []
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size if version > 1 else size + -size % 8
    name, kind, space = pieces
    count, itemsize = math.prod(_shape(space)), struct.unpack_from("<I", kind, 4)[0]
    variable = kind[0] & 15 == _VARIABLE and kind[1] & 15 == 1
    if not itemsize or not (variable or kind[0] & 15 == _STRING):
        return _text(name), ()
    if len(data) < at + count * itemsize:
        raise CorruptCheckpointError("an attribute is cut off; copy the file again.")
    items = [data[at + i * itemsize : at + (i + 1) * itemsize] for i in range(count)]
    return _text(name), tuple(_text(_referred(item, heap) if variable else item) for item in items)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode()


def _referred(reference: bytes, heap: Callable[[int], Mapping[int, bytes]]) -> bytes:
    """The text that a reference into a global heap stands for."""
    length, address, index = struct.unpack("<IQI", reference)
    text = heap(address).get(index, b"") if length else b""
    if len(text) < length:
        raise CorruptCheckpointError("a text that is not in its heap; copy the file again.")
    return text[:length]
