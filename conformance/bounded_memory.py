"""A pytest plugin for all tests (addopts): what compilers make and keep is bounded, and the search for garbage."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

LIMIT = 2 << 30
"""Bytes of a process from which on what its frameworks have compiled is let go."""
STEP = 1 << 28
"""Bytes by which a process has grown since it was last looked at."""

LOWERED = {
    "pjit": "_pjit_lower",
    "interpreters.pxla": "_cached_lowering_to_hlo",
    "interpreters.mlir": "make_ir_context",
}
"""Where JAX keeps what it lowers: a room of jax._src -> a cache."""

_kept = [0]


def share_dialects() -> None:
    """Have JAX load MLIR's dialects once, not anew for each program: a fifth of the time that a small one takes."""
    mlir: Any = sys.modules.get("jax._src.interpreters.mlir")
    if mlir is not None and not hasattr(mlir.make_ir_context, "cache_clear"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def pytest_collection_finish() -> None:
    """Garbage is looked for rarely, and not among what is imported: millions of objects, a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


@pytest.fixture(autouse=True)
def bounded_memory():
    """JAX, TensorFlow and torch keep whatever they have compiled; thousands of tests compile many gigabytes."""
    share_dialects()  # before each test, for any may have been the first to import JAX
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
    """JAX keeps the text of each program beside what was compiled of it, and never reads it again."""
    for room, name in LOWERED.items():
        kept: Any = getattr(sys.modules.get(f"jax._src.{room}"), name, None)
        if hasattr(kept, "cache_clear"):  # another version of JAX keeps it elsewhere, and is bounded by LIMIT alone
            kept.cache_clear()


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
