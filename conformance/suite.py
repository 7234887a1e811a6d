"""The whole suite as a list of checks, each a name and what it yields.

Pytest and the command line run the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mistral_core.config.presets import TINY
from mistral_core.devices import CPU

from . import adapter_pieces, adapters, packed_pieces, pieces, sampling
from .cases import CAUSAL, HEADS, LONG, PACKED, T
from .compare import Comparison
from .pieces import Subject

DTYPES = ("float32", "bfloat16")
ASKED_FOR = ("float16",)
"""Compared where it is asked for by name: whatever is compared in bfloat16, for users of GPUs that have no other."""
WINDOW = TINY.sliding_window or 0
PROMPTS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 1)
LOSS_CHUNK = 7  # which divides neither all tokens of a batch nor its columns
CACHED = tuple(case for case in CAUSAL if case.name not in ("documents", "begin-again"))


class Check(NamedTuple):
    """One thing to compare on any subject."""

    name: str
    compared: Callable[[Subject], Iterator[Comparison]]
    dtypes: tuple[str, ...] = DTYPES
    attention: bool = True
    """Whether it depends on the attention implementation."""

    def run(self, subject: Subject) -> list[Comparison]:
        """All that it compares, of texts that are cut into blocks although they are short."""
        with subject.adapter.short_blocks():
            return list(self.compared(subject))

    def fails(self, subject: Subject) -> bool:
        """Whether something that it compares is not right; what comes after the first of that kind is not computed."""
        with subject.adapter.short_blocks():
            return any(not item.passed for item in self.compared(subject))

    def suits(self, implementation: str, dtype: str) -> bool:
        """Whether it says anything of a subject that another one does not."""
        kind = "bfloat16" if dtype in ASKED_FOR else dtype
        return kind in self.dtypes and (self.attention or implementation == "eager")


def _partial(
    function: Callable[..., Iterator[Comparison]], *args: object, **options: object
) -> Callable[..., Iterator[Comparison]]:
    @functools.wraps(function)
    def run(subject: Subject) -> Iterator[Comparison]:
        return function(subject, *args, **options)

    return run


def _checks() -> Iterator[Check]:
    """Small before large: where a small piece is wrong, look there first."""
    yield Check("functions", pieces.functions)
    yield Check("blocks", _partial(pieces.blocks, pieces.by_name("left-padding")))
    yield Check("blocks query-scale", _partial(pieces.blocks, pieces.by_name("query-scale")))
    for case in (*CAUSAL, *HEADS, LONG):
        yield Check(f"whole {case.name}", _partial(pieces.whole, case))
    for case in CACHED:
        for chunking in pieces.CHUNKINGS[1:]:
            name = f"cached {case.name} {'+'.join(map(str, chunking))}"
            yield Check(name, _partial(pieces.cached, case, chunking), ("float32",))
        yield Check(f"cached {case.name} by ones", _partial(pieces.cached, case, (1,) * T))
    yield Check("full cache", _partial(pieces.cached, CAUSAL[0], pieces.CHUNKINGS[2], rolling=False), ("float32",))
    yield Check("int8 codes", pieces.codes, attention=False)
    for chunks in pieces.CHUNKINGS:
        name = "by ones" if len(chunks) == T else "+".join(map(str, chunks))
        run = _partial(pieces.cached_int8, chunks)
        yield Check(f"cached int8 {name}", run, ("float32",), attention=False)
    run = _partial(pieces.cached_int8, pieces.CHUNKINGS[2], rolling=False)
    yield Check("full cache int8", run, ("float32",), attention=False)
    for prompt in PROMPTS:
        yield Check(f"prompt of {prompt}", _partial(pieces.turns, prompt))
    for count in (1, 2, 4):
        yield Check(f"rollback of {count}", _partial(pieces.rollback, count))
    yield Check("greedy", _partial(pieces.greedy, in_c=False), ("float32",))
    yield Check("greedy in C", _partial(pieces.greedy, in_c=True), ("float32",), attention=False)
    yield Check("greedy int8", pieces.greedy_int8, ("float32",), attention=False)
    for name in ("window", "sequence", "token", "question"):
        run = _partial(pieces.modules, pieces.by_name(name))
        yield Check(f"modules {name}", run, ("float32",), attention=False)
    for name in ("window", "sequence", "sequence-number", "sequence-many", "token", "question"):
        yield Check(f"parts {name}", _partial(pieces.parts, pieces.by_name(name)), ("float32",), attention=False)
    yield Check("noise", sampling.noise, ("float32",), attention=False)
    for name in sampling.CHOICES:
        yield Check(f"choice {name}", _partial(sampling.choices, name), ("float32",), attention=False)
    yield Check("nothing to choose", sampling.nothing_to_choose, ("float32",), attention=False)
    for name, options in sampling.TEXTS.items():
        yield Check(name, _partial(sampling.texts, options), ("float32",), attention=False)
    for case in (*CAUSAL, *HEADS, LONG):
        if "labels" in case.inputs or "start_positions" in case.inputs:
            yield Check(f"gradients {case.name}", _partial(pieces.gradients, case), ("float32",))
    for name in ("window", "tied", "left-padding"):
        run = _partial(pieces.gradients, pieces.by_name(name), loss_chunk=LOSS_CHUNK)
        yield Check(f"chunked {name}", run, ("float32",), attention=False)
    for activations in (None, "int8"):
        for kernels in (True, False):
            name = (
                "packed-product" + (" of rounded rows" if activations else "") + ("" if kernels else " without kernels")
            )
            run = _partial(packed_pieces.products, activations, kernels=kernels)
            yield Check(name, run, attention=False)
    for dtype in DTYPES:
        yield Check(f"packed-codes of {dtype}", _partial(packed_pieces.codes, dtype), ("float32",), attention=False)
    yield Check("packed-files", packed_pieces.files, ("float32",), attention=False)
    for case in PACKED:
        yield Check(case.name, _partial(packed_pieces.whole, case), attention=False)
        cached = _partial(pieces.cached, case, (T - 1, 1))  # many rows of each text, and one
        yield Check(case.name.replace("packed", "packed-cached"), cached, ("float32",), attention=False)
        greedy = _partial(sampling.texts, sampling.GREEDY, case, 1)
        yield Check(case.name.replace("packed", "packed-greedy"), greedy, ("float32",), attention=False)
    yield Check("packed-rounded", packed_pieces.rounded_text, ("float32",), attention=False)
    sampled = _partial(sampling.texts, sampling.TEXTS["sampled, guessed"], pieces.by_name("packed int4 32"))
    yield Check("adapters", adapter_pieces.logits, ("float32",), attention=False)
    yield Check("gradients of adapters", adapter_pieces.gradients, ("float32",), attention=False)
    yield Check("packed-sampled int4 32", sampled, ("float32",), attention=False)


CHECKS = {check.name: check for check in _checks()}


@functools.cache
def subject(backend: str, implementation: str, dtype: str, package: str | None = None, *, device: str = CPU) -> Subject:
    """A backend ready to be compared; raises ImportError without its framework, ConfigError without the device."""
    return Subject(adapters.get(backend, package, device=device), implementation, dtype)


def subjects(
    backends: tuple[str, ...] = adapters.NAMES,
    dtypes: tuple[str, ...] = DTYPES,
    implementations: tuple[str, ...] = (),
    *,
    device: str = CPU,
) -> Iterator[Subject]:
    """Every backend x attention implementation x dtype asked for."""
    for backend in backends:
        for implementation in adapters.get(backend, device=device).implementations:
            if implementations and implementation not in implementations:
                continue
            for dtype in dtypes:
                yield subject(backend, implementation, dtype, device=device)
