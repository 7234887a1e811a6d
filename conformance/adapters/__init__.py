"""One adapter a backend: everything the suite needs of an implementation, in NumPy."""

from __future__ import annotations

import importlib

from .base import Adapter

NAMES = ("torch", "flax", "tf")


def get(name: str, package: str | None = None) -> Adapter:
    """The adapter of a backend; `package` is another copy of it (a mutant).

    Raises ImportError without its framework.
    """
    module = importlib.import_module(f".{name}", __name__)
    adapter: Adapter = module.BackendAdapter(package or f"mistral_{name}")
    return adapter
