"""A pytest plugin for all tests: the memory that compilers keep is bounded (pyproject.toml, addopts)."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest

LIMIT = 2 << 30
"""Bytes of a process from which on what its frameworks have compiled is let go."""
STEP = 1 << 28
"""Bytes by which a process has grown since, where what stays is that much already."""

_kept = [0]


@pytest.fixture(autouse=True)
def bounded_memory():
    """JAX, TensorFlow and torch keep whatever they have compiled; thousands of tests compile many gigabytes."""
    yield
    if _resident() > max(LIMIT, _kept[0] + STEP):
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo"].reset()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        _kept[0] = _resident()


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no such file on other systems
        return 0
