"""What a prompt is made of: texts, and control tokens that no text can become."""

from __future__ import annotations

from typing import NamedTuple


class Control(NamedTuple):
    """A control token by its name, such as `[INST]`, put there by the structure of a conversation."""

    name: str


class Infill(NamedTuple):
    """A text that goes on after another: its ids are those of "\u263a" + text less the first two."""

    text: str


Segment = str | Control | Infill
"""Texts are encoded one by one: what SentencePiece puts before a text stands before each of them."""

Spans = tuple[tuple[int, int], ...]
"""Where some parts of a text begin and end, in characters."""


class Part(NamedTuple):
    """A segment of a conversation, and where in it stands what an assistant said."""

    segment: Segment
    said: Spans = ()


def length(segment: Segment) -> int:
    """Characters of a segment."""
    return len(segment) if isinstance(segment, str) else len(segment[0])


def whole(segment: Segment) -> Part:
    """A segment that an assistant said all of."""
    return Part(segment, ((0, length(segment)),))
