"""A pytest plugin for all tests: a file of tests leaves our modules' constants as their sources have them (addopts).

What one file changes for good, others compute with; which of them, and in what order, a run decides by chance.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = ("mistral_core", "mistral_torch", "mistral_flax", "mistral_tf")


@pytest.fixture(scope="module", autouse=True)
def unchanged() -> Iterator[None]:
    """Fails the last test of a file after which a constant is another."""
    yield
    assert not (changed := list(_changed())), f"a file of tests changed for good: {', '.join(changed)}"


def _changed() -> Iterator[str]:
    for module, loaded in list(sys.modules.items()):
        if module.partition(".")[0] in OURS and getattr(loaded, "__file__", None):
            for name, value in _literals(loaded.__file__).items():
                if (found := getattr(loaded, name)) != value:
                    yield f"{module}.{name} is {found!r} and not {value!r}"


@functools.cache
def _literals(path: str) -> dict[str, object]:
    """The constants of a file that are written out, such as COLUMNS = 512."""
    return {
        line.targets[0].id: line.value.value
        for line in ast.parse(Path(path).read_bytes()).body
        if isinstance(line, ast.Assign)
        and isinstance(line.targets[0], ast.Name)
        and isinstance(line.value, ast.Constant)
        and line.targets[0].id.isupper()
    }
