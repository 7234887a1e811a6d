"""Which line of whose code a warning points at: the first that is not of this package."""

from __future__ import annotations

import sys

PACKAGE = __name__.partition(".")[0]


def stack_level() -> int:
    """`stacklevel` for a warning that is raised by the caller of this function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    return level
