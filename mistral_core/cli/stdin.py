"""A text that comes through a pipe."""

from __future__ import annotations

import sys

from ..errors import EmptyInputError, InputError


def read(argument: str, purpose: str) -> str:
    """All of stdin but the newline at its end.

    Raises EmptyInputError where nothing comes or a terminal waits, InputError for what is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise EmptyInputError(f"{argument}: nothing to {purpose}; give it as an argument or through a pipe.")
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as cause:
        raise InputError(f"stdin: not UTF-8 at byte {cause.start}; convert the text first.") from cause
    if not text:
        raise EmptyInputError(f"stdin: nothing to {purpose}; send a text through the pipe.")
    return text
