"""tokenizer.model: the pieces of a SentencePiece model, out of its protobuf and nothing else.

The fields are those of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, which GGUF numbers alike."""

_BPE = 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _DUMMY_PREFIX = 3, 3


class Model(NamedTuple):
    """What a BPE needs of a SentencePiece model."""

    pieces: list[tuple[str, float, int]]
    """(text, score, kind)"""
    is_bpe: bool
    add_dummy_prefix: bool


def parse(data: bytes, where: str) -> Model:
    """The model of a file's bytes; raises TokenizerError where it is not one."""
    pieces, model_type, prefix = [], 1, 1
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                piece = {_SCORE: 0.0, _KIND: NORMAL, **dict(_fields(_bytes(value)))}
                pieces.append((_bytes(piece[_TEXT]).decode(), _float(piece[_SCORE]), _integer(piece[_KIND])))
            elif number == _TRAINER:
                model_type = _integer(dict(_fields(_bytes(value))).get(_MODEL_TYPE, model_type))
            elif number == _NORMALIZER:
                prefix = _integer(dict(_fields(_bytes(value))).get(_DUMMY_PREFIX, prefix))
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as cause:
        raise TokenizerError(f"{where}: not a SentencePiece model ({cause}); fetch it again.") from cause
    if not pieces:
        raise TokenizerError(f"{where}: holds no pieces; fetch it again.")
    return Model(pieces, model_type == _BPE, bool(prefix))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of a message's fields."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {at}")
        size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + size > len(data):
            raise ValueError(f"{size} bytes at byte {at} of {len(data)}")
        content, at = data[at : at + size], at + size
        yield number, struct.unpack("<f", content)[0] if kind == 5 else content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 64 bits at byte {at}")


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"{value!r} instead of bytes")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError("bytes instead of an integer")
    return value


def _float(value: object) -> float:
    if not isinstance(value, float):
        raise TypeError("no float32 where one was expected")
    return value
