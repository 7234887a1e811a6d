"""Colours, one table for page, PNG and terminal: told apart without seeing red or green, and by lightness."""

from __future__ import annotations

from .panel import Reason

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b2430",
    "faint": "#5d6978",
    "line": "#d5dce4",
    "sees": "#2b6cb0",
    "self": "#123a66",
    "future": "#b9c3ce",
    "window": "#c97a00",
    "document": "#b0478a",
    "padding": "#93a0ae",
    "weight-0": "#eef2f7",
    "weight-1": "#5b93cf",
    "weight-2": "#0b2545",
}
DARK = {
    "paper": "#12161c",
    "ink": "#e8edf3",
    "faint": "#9aa7b5",
    "line": "#2f3844",
    "sees": "#5aa2e6",
    "self": "#d3e8ff",
    "future": "#46525f",
    "window": "#f0a830",
    "document": "#e083bd",
    "padding": "#66737f",
    "weight-0": "#1c232c",
    "weight-1": "#3a7fc4",
    "weight-2": "#f4f1c9",
}
TERMINAL = {
    Reason.SEES: "#4a90d9",
    Reason.FUTURE: "#8a8a8a",
    Reason.WINDOW: "#e69f00",
    Reason.DOCUMENT: "#cc79a7",
    Reason.PADDING: "#8a8a8a",
}
"""Legible on a dark and on a light background, neither of which is known."""
SELF = "#9cc9f5"


def weight_colour(weight: float, colours: dict[str, str]) -> tuple[int, int, int]:
    """The colour of an attention weight in [0, 1]; the square root of it, so that small ones can be seen."""
    at = 2 * min(max(weight, 0.0), 1.0) ** 0.5
    first, second = ("weight-0", "weight-1") if at < 1 else ("weight-1", "weight-2")
    share = at if at < 1 else at - 1
    pairs = zip(rgb(colours[first]), rgb(colours[second]), strict=True)
    red, green, blue = (round(a + (b - a) * share) for a, b in pairs)
    return red, green, blue


def faded(colour: str) -> tuple[int, int, int]:
    """A fifth of a colour on white paper."""
    red, green, blue = (255 - (255 - part) // 5 for part in rgb(colour))
    return red, green, blue


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
