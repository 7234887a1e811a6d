"""The conformance suite of a backend on the device, as far as its time goes: what many rely on first.

Options: backend. Of each check of each attention implementation in float32, bfloat16 and float16 a line: how many
comparisons, and those that failed. PyTorch multiplies float32 without TF32 unless a program asks for it, and the
models in JAX ask for full precision.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.common import task

from .device import problem, tell

FIRST = ("functions", "blocks", "whole window", "whole left-padding", "cached window 7+1+3+6", "gradients window")
LAST = ("greedy", "sampled", "beams", "packed", "modules", "adapters", "gradients of adapters")
"""How the names of checks begin that many compile for, or that lie outside of what a GPU does otherwise."""


def rank(name: str) -> int:
    """In which of three turns a check comes."""
    return 0 if name in FIRST else 2 if name.startswith(LAST) else 1


def turns(asked: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(subject, check) in the order of importance."""
    from conformance import suite

    backend, device = asked["options"]["backend"], asked["device"]
    dtypes = (*suite.DTYPES, *suite.ASKED_FOR)
    subjects = list(suite.subjects((backend,), dtypes, device=device))
    checks = sorted(suite.CHECKS.values(), key=lambda check: rank(check.name))
    for check, subject in itertools.product(checks, subjects):  # every dtype comes equally far
        wanted = rank(check.name) == 0 or not asked["quick"]
        if wanted and check.suits(subject.implementation, subject.dtype):
            yield subject, check


def main() -> None:
    asked = task()
    end = time.perf_counter() + asked["seconds"]
    points = list(turns(asked))
    tell(points=len(points))
    for subject, check in points:
        if time.perf_counter() > end:
            break
        row: dict[str, Any] = {"subject": subject.key, "check": check.name}
        try:
            found = list(check.run(subject))
        except Exception as error:  # told as a failure; the others are compared all the same
            tell(**row, compared=0, failed=[problem(error)])
            continue
        tell(**row, compared=len(found), failed=[str(item) for item in found if not item.passed][:3])


if __name__ == "__main__":
    main()
