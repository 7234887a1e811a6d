"""What is told to people: text that no terminal obeys, values in bounded words, warnings at the caller's own line."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any

OURS = frozenset({"mistral_core", "mistral_torch", "mistral_flax", "mistral_tf"})
BETWEEN = frozenset({
    "contextlib", "dataclasses", "enum", "flax", "functools", "importlib", "jax", "keras", "tensorflow", "torch",
})  # fmt: skip
"""Packages through which our code calls our code: their lines are never the caller's."""
LONGEST_CHARACTERS = 120
"""Characters of a value in a message."""

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters of ASCII and Latin-1, but line ends and tabs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f"  # line ends of another kind, annotations, invisible tags
    "\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)


def printable(text: str) -> str:
    """A text without a character that a terminal obeys: they are written as escapes, all but line ends and tabs."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(value: Any) -> str:
    """A value as `repr` has it, cut where it is long: what a file says may be of any length."""
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes | list | tuple) and len(value) > LONGEST_CHARACTERS:
        return f"{value[: LONGEST_CHARACTERS // 2]!r}... ({len(value)} in all)"[: 2 * LONGEST_CHARACTERS]
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= LONGEST_CHARACTERS else f"{text[:LONGEST_CHARACTERS]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean "temperature"?)` where a known name is like this one, else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def near_miss(name: str, known: Iterable[str]) -> str | None:
    """The known name that another one is surely meant to be; none for the id of a token, of which there are many."""
    found = [] if name.endswith("_token_id") else difflib.get_close_matches(name, list(known), n=1, cutoff=0.85)
    return found[0] if found else None


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of these packages whose call led here, so that the reader sees a line of their own."""
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and _package(frame) in OURS | BETWEEN:
        frame = frame.f_back
    warnings.warn_explicit(
        printable(message),
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
