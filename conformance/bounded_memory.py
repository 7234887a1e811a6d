"""A pytest plugin for all tests: the memory that compilers keep is bounded, and the search for garbage (addopts)."""

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
"""Bytes by which a process has grown since it was last looked at."""

_kept = [0]


def pytest_collection_finish() -> None:
    """Garbage is looked for rarely, and not among what is imported: millions of objects, a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True)
def bounded_memory():
    """JAX, TensorFlow and torch keep whatever they have compiled; thousands of tests compile many gigabytes."""
    yield
    if _resident() <= _kept[0] + STEP:
        return
    for forget in (_forget_lowered, gc.collect, _forget_compiled):  # from the cheapest on
        forget()
        _give_back()
        if _resident() <= max(LIMIT, _kept[0] + STEP):
            break
    _kept[0] = _resident()


def _forget_lowered() -> None:
    """JAX keeps a megabyte of text beside each program that was compiled of it, and never reads it again."""
    for room, name in (("pjit", "_pjit_lower"), ("interpreters.pxla", "_cached_lowering_to_hlo")):
        lowered = getattr(sys.modules.get(f"jax._src.{room}"), name, None)
        if lowered is not None:  # another version of JAX keeps it elsewhere, and is bounded by LIMIT alone
            lowered.cache_clear()


def _forget_compiled() -> None:
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()


def _give_back() -> None:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no such file on other systems
        return 0
