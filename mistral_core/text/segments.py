"""What a prompt is made of: texts, and control tokens that no text can become."""

from __future__ import annotations

from typing import NamedTuple


class Control(NamedTuple):
    """A control token by its name, such as `[INST]`, put there by the structure of a conversation."""

    name: str


Segment = str | Control
"""Texts are encoded one by one: what SentencePiece puts before a text stands before each of them."""
