"""What a part of a model does by itself: what is computed in its place is computed only while that is so."""

from __future__ import annotations

from typing import Any


def runs_its_own(part: Any, method: str) -> bool:
    """Whether a method of a part is the one that its class was written with: none was put into either later."""
    return method not in vars(part) and is_as_written(type(part), method)


def is_as_written(kind: type, method: str) -> bool:
    """Whether a method of a class is a function of the package that defines the class; also where it has none."""
    for each in kind.__mro__:
        if (found := vars(each).get(method)) is not None:
            home = getattr(found, "__globals__", {}).get("__name__", "")
            return home.partition(".")[0] == each.__module__.partition(".")[0]
    return True
