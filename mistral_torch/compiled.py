"""Functions compiled by torch for `generate`: for any weights, or frozen for weights that stay as they are.

Frozen means that inductor packs a second copy of the weights in the order in which its fastest kernels read them. It
is made of a model for as long as every bit of its weights is what it was: `fingerprint` reads all of them at every
call of `generate`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mistral_core.errors import GenerationConfigError

LOG = logging.getLogger("mistral.torch")
FROZEN = {"freezing": True, "max_autotune": True, "max_autotune_report_choices_stats": False}
VARIANTS = 64
"""How many shapes and rules a function is compiled for, before torch refuses to compile it once more."""
_WORD = 64
"""Numbers of 8 bytes that a fingerprint adds up before it tells places apart."""
_ROUNDS = 3
"""How often each of several ways is timed, in turn: the least time of each counts."""

_kept: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, bool], Compiled]] = weakref.WeakKeyDictionary()
_choices: weakref.WeakKeyDictionary[nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


class Compiled:
    """A function compiled once for each shape and rule it is called with; says so where it does."""

    def __init__(self, function: Callable[..., Any], *, frozen: bool, mode: str | None) -> None:
        # code of its own: torch keeps what it compiles beside the code, as long as that lives
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        self._function = torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
        self._known: set[Any] = set()
        self._frozen = frozen
        self.prints: list[int] = []
        """The fingerprint of the weights that are frozen."""

    def __call__(self, *arguments: Any, kind: Any) -> Any:
        """The function's result; `kind` is all that it is compiled for."""
        if kind in self._known:
            return self._function(*arguments)
        self._known.add(kind)
        started = time.perf_counter()
        LOG.info("compiling for %s; this takes some ten seconds", kind)
        with (
            torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS**2),
            _freezing() if self._frozen else contextlib.nullcontext(),
        ):
            result = self._function(*arguments)
        LOG.info("compiled in %.1f s", time.perf_counter() - started)
        return result


@contextlib.contextmanager
def _freezing() -> Iterator[None]:
    """Inductor freezes what it compiles in this context, and does not tell how fast each kernel was that it tried."""
    from torch._inductor import select_algorithm

    told, select_algorithm.PRINT_AUTOTUNE = select_algorithm.PRINT_AUTOTUNE, False
    try:
        with torch._inductor.config.patch(FROZEN), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # its own
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = told


def compiled(model: nn.Module, function: Callable[..., Any], *, frozen: bool = False) -> Compiled:
    """A function of a model compiled, the same one until the model goes or, frozen, until its weights change.

    Raises GenerationConfigError where there is no memory for a second copy of the weights.
    """
    functions, key = _kept.setdefault(model, {}), (function, frozen)
    prints = fingerprint(model) if frozen else []
    if key in functions and functions[key].prints != prints:
        LOG.info("the weights have changed since they were frozen")
        del functions[key]
        _forget()
    if key not in functions:
        if frozen:
            _check_memory(model)
        # CUDA graphs replay a step without Python; on CPU there is nothing to replay
        device = next(model.parameters()).device.type
        functions[key] = Compiled(function, frozen=frozen, mode="reduce-overhead" if device == "cuda" else None)
        functions[key].prints = prints
    return functions[key]


def let_go(model: nn.Module, function: Callable[..., Any]) -> None:
    """Forget what a function was compiled to with frozen weights, and the copy of these."""
    if _kept.get(model, {}).pop((function, True), None) is not None:
        _forget()


def choices(model: nn.Module) -> dict[Any, str]:
    """What was found to be the fastest way for a model: by kind of step, a name."""
    return _choices.setdefault(model, {})


def fastest(kind: Any, ways: dict[str, Callable[[], Any]]) -> str:
    """The name of the fastest of several ways to compute the same, which it tells."""
    for way in ways.values():  # compiles
        way()
    seconds = dict.fromkeys(ways, math.inf)
    for _, (name, way) in itertools.product(range(_ROUNDS), ways.items()):
        started = time.perf_counter()
        way()
        seconds[name] = min(seconds[name], time.perf_counter() - started)
    kept = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in seconds.items())
    LOG.info("a step for %s takes: %s; %s is kept", kind, times, kept)
    return kept


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """A number of each parameter and buffer that changes with any of its bits or their places."""
    return [_print(x) for x in (*model.parameters(), *model.buffers())]


def _print(x: Tensor) -> int:
    bits = x.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = bits.numel() // (8 * _WORD) * 8 * _WORD
    sums = bits[:whole].view(torch.int64).view(-1, _WORD).sum(1)
    places = torch.arange(1, 2 * len(sums) + 1, 2, device=x.device)  # odd, so that no bit of a sum is lost
    rest = bits[whole:].long()
    return int((sums * places).sum() + (rest * torch.arange(1, len(rest) + 1, device=x.device)).sum()) ^ x.data_ptr()


def _check_memory(model: nn.Module) -> None:
    device = next(model.parameters()).device
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type != "cpu" or not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    free = _free_memory()
    if 2 * size > free:
        raise GenerationConfigError(
            f"compile='max': a second copy of the weights is packed, which takes {2 * size / 1e9:.1f} GB while it is "
            f"made, and {free / 1e9:.1f} GB are free; use compile='on'."
        )


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _forget() -> None:
    """Let go of compiled modules, which inductor keeps with the weights frozen in them; those in use stay."""
    from torch._inductor.codecache import PyCodeCache

    PyCodeCache.cache_clear()
