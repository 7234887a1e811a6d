"""Products of parameters, of which the default run takes what stands for the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def crossed(names: Iterable[str], *others: str) -> list[Any]:
    """(name, other): each name beside the first of the others, each of the others beside the first name; slow the rest.

    For what has nothing to do with each other: names and shapes are a config's, how numbers are stored is a dtype's.
    """
    names = list(names)
    return [
        pytest.param(name, other, marks=() if name == names[0] or other == others[0] else pytest.mark.slow)
        for other in others
        for name in names
    ]
