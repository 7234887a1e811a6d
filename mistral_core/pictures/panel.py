"""A matrix over the tokens of a text: who sees whom, why not, and with what weight."""

from __future__ import annotations

import enum
from typing import NamedTuple

from ..arrays import Array


class Reason(enum.IntEnum):
    """Why a token sees another, or does not; the values of `Panel.reasons`."""

    SEES = 0
    FUTURE = 1
    WINDOW = 2
    DOCUMENT = 3
    PADDING = 4


class Style(NamedTuple):
    """How a reason is told."""

    letter: str
    """Without colours."""
    title: str
    sentence: str
    """With {query}, {key}, {distance} and {window} to be filled in."""


STYLES = {
    Reason.SEES: Style("#", "sees", "{query} sees {key}."),
    Reason.FUTURE: Style(".", "comes later", "{query} does not see {key}, which comes later."),
    Reason.WINDOW: Style(
        "w",
        "outside the window",
        "{query} does not see {key}, {distance} tokens back: outside the window of {window} (itself included).",
    ),
    Reason.DOCUMENT: Style("d", "another document", "{query} does not see {key}, which is in another document."),
    Reason.PADDING: Style("p", "padding", "{query} and {key}: padding sees nothing and is seen by no token."),
}
SELF = "{query} sees itself."
WEIGHT = "{query} gives {weight} of its attention to {key}."


class Token(NamedTuple):
    """One token of a text, safe to show anywhere."""

    label: str
    position: int | None
    """The number of real tokens before it in its row; None for padding."""
    document: int | None = None
    """Which of several packed documents it is in."""
    is_control: bool = False

    @property
    def name(self) -> str:
        """As sentences call it."""
        if self.position is None:
            return "padding"
        inside = "" if self.document is None else f", document {self.document}"
        return f"'{self.label.strip('▁') or self.label}' (position {self.position}{inside})"


class Panel(NamedTuple):
    """One matrix: the tokens of a text on both axes, for some layers."""

    title: str
    row: int
    """Which of the texts."""
    layers: tuple[int, ...]
    window: int | None
    reasons: Array
    """[T, T] uint8, of `Reason`: row t, column s says whether query t sees key s."""
    head: int | None = None
    weights: Array | None = None
    """[T, T] float32: the share of its attention that query t gives to key s."""
