"""What a class of modules does by itself: what is computed in its place is computed only while that is so."""

from __future__ import annotations

from typing import Any


def runs_its_own(part: Any, method: str) -> bool:
    """Whether a method of a part's class is of the package that defines the class, and none put there later."""
    for kind in type(part).__mro__:
        if (found := vars(kind).get(method)) is not None:
            home = getattr(found, "__globals__", {}).get("__name__", "")
            return home.partition(".")[0] == kind.__module__.partition(".")[0]
    return True
