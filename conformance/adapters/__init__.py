"""One adapter a backend: everything the suite needs of an implementation, in NumPy."""

from __future__ import annotations

import importlib

from mistral_core.devices import CPU

from .base import Adapter

NAMES = ("torch", "flax", "tf")


def get(name: str, package: str | None = None, *, device: str = CPU) -> Adapter:
    """The adapter of a backend on a device; `package` is another copy of it (a mutant).

    Raises ImportError without its framework, ConfigError where it has no such device.
    """
    module = importlib.import_module(f".{name}", __name__)
    adapter: Adapter = module.BackendAdapter(package or f"mistral_{name}", device=device)
    return adapter
