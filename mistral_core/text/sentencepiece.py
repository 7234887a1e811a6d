"""tokenizer.model: the pieces of a SentencePiece model, out of its protobuf and nothing else.

The fields are those of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..disk import limits
from ..errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces, which GGUF numbers alike."""

SPACE = "\u2581"
"""How a space is written in a piece."""

_BPE = 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5


class Model(NamedTuple):
    """What a BPE needs of a SentencePiece model."""

    pieces: list[tuple[str, float, int]]
    """(text, score, kind)"""
    is_bpe: bool
    byte_fallback: bool
    add_dummy_prefix: bool
    keeps_text: bool
    """Whether a text is taken as it is, but for spaces: no Unicode normalization, no space removed."""


def parse(data: bytes, where: str) -> Model:
    """The model of a file's bytes; raises TokenizerError where it is not one, LimitExceededError beyond limits."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    try:
        for number, value in _fields(data):
            if number == _PIECES:
                pieces.append(_piece(_bytes(value)))
            elif number == _TRAINER:
                trainer |= dict(_fields(_bytes(value)))
            elif number == _NORMALIZER:
                normalizer |= dict(_fields(_bytes(value)))
        model = Model(
            pieces,
            is_bpe=_integer(trainer.get(_MODEL_TYPE, 1)) == _BPE,
            byte_fallback=bool(_integer(trainer.get(_BYTE_FALLBACK, 0))),
            add_dummy_prefix=bool(_integer(normalizer.get(_DUMMY_PREFIX, 1))),
            keeps_text=not _bytes(normalizer.get(_CHARSMAP, b""))
            and not _integer(normalizer.get(_REMOVE_SPACES, 1))
            and bool(_integer(normalizer.get(_ESCAPE_SPACES, 1))),
        )
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as cause:
        raise TokenizerError(f"{where}: not a SentencePiece model ({cause}); fetch it again.") from cause
    if not pieces:
        raise TokenizerError(f"{where}: holds no pieces; fetch it again.")
    longest = max(len(text) for text, _, _ in pieces)
    limits.check(longest, limits.TOKEN_CHARACTERS, what="characters of one piece", where=where)
    special = sum(kind in (CONTROL, UNKNOWN, USER_DEFINED) for _, _, kind in pieces)
    limits.check(special, limits.SPECIAL_TOKENS, what="special pieces", where=where)
    return model


_SCORED = struct.Struct("<f")


def _piece(data: bytes) -> tuple[str, float, int]:
    """(text, score, kind) of a piece."""
    # nearly all say text, score and kind in this order and in few bytes: the general way takes six times as long
    size = data[1] if len(data) > 2 and data[0] == 0x0A else 0x80
    rest = data[2 + size :]
    if (
        size < 0x80
        and len(rest) in (5, 7)
        and rest[0] == 0x15
        and (len(rest) == 5 or (rest[5] == 0x18 and rest[6] < 0x80))
    ):
        kind = rest[6] if len(rest) == 7 else NORMAL
        return data[2 : 2 + size].decode(), _SCORED.unpack_from(rest, 1)[0], kind
    piece = {_SCORE: 0.0, _KIND: NORMAL, **dict(_fields(data))}
    return _bytes(piece[_TEXT]).decode(), _float(piece[_SCORE]), _integer(piece[_KIND])


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
        raise TypeError(f"the score must be a float32, got {type(value).__name__}")
    return value
