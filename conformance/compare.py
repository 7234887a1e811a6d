"""One comparison of one array with what the specification says, with everything needed to understand a failure."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from mistral_core.arrays import Array

from .tolerances import Tolerance, eps_of


class Comparison(NamedTuple):
    """How far an implementation is from the specification at one piece of one case."""

    backend: str
    implementation: str
    dtype: str
    case: str
    piece: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    """Relative to the largest expected value."""
    worst: tuple[int, ...]
    ulp: float
    """The largest difference in units of the dtype's eps times the largest expected value."""
    equal: float
    """Fraction of elements that are equal once rounded to the dtype."""
    argmax: float
    """Fraction of last-axis argmaxes that agree."""
    tolerance: Tolerance
    problem: str = ""
    """What is wrong, empty if nothing is."""

    @property
    def passed(self) -> bool:
        """Whether the array is what it must be."""
        return not self.problem

    @property
    def headroom(self) -> float:
        """Tolerance over difference: below 1 fails; infinite where there is no difference."""
        return self.tolerance.ulp / self.ulp if self.ulp else float("inf")

    def __str__(self) -> str:
        where = f"{self.backend}/{self.implementation}/{self.dtype} {self.case}: {self.piece} {list(self.shape)}"
        return (
            f"{where}: {self.problem or 'ok'}; max |difference| {self.max_abs:.3g} at {list(self.worst)}, "
            f"{self.ulp:.3g} of {self.tolerance.ulp:.3g} ulp, {self.equal:.1%} equal, argmax {self.argmax:.1%}"
        )


def compare(
    subject: tuple[str, str, str],
    case: str,
    piece: str,
    actual: Array,
    expected: Array,
    tolerance: Tolerance,
    *,
    dtype_is: str | None = None,
) -> Comparison:
    """Compare an array with its expected value and dtype; `subject` is (backend, implementation, dtype)."""
    dtype = subject[2]
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        problem = f"the shape must be {expected.shape}, got {actual.shape}"
        return _broken(subject, case, piece, actual, tolerance, problem)
    if dtype_is is not None and actual.dtype.name != dtype_is:
        problem = f"the dtype must be {dtype_is}, got {actual.dtype.name}"
        return _broken(subject, case, piece, actual, tolerance, problem)
    wide = actual.astype(np.float64)
    if not np.isfinite(wide).all():
        return _broken(subject, case, piece, actual, tolerance, "NaN or infinity")
    difference = np.abs(wide - expected)
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    worst = np.unravel_index(int(difference.argmax()), difference.shape) if difference.size else ()
    max_abs = float(difference.max(initial=0))
    ulp = max_abs / (eps_of(dtype) * scale)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    equal = float((wide.astype(kind) == expected.astype(kind)).mean())
    argmax = 1.0
    if actual.ndim and actual.shape[-1] > 1:
        argmax = float((wide.argmax(-1) == expected.argmax(-1)).mean())
    problem = ""
    if ulp > tolerance.ulp:
        problem = "too far"
    elif equal < tolerance.equal:
        problem = f"the part equal to the bit must be at least {tolerance.equal:.0%}, got {equal:.1%}"
    return Comparison(
        *subject, case, piece, actual.shape, max_abs, max_abs / scale, tuple(map(int, worst)), ulp, equal, argmax,
        tolerance, problem,
    )  # fmt: skip


def _broken(
    subject: tuple[str, str, str], case: str, piece: str, actual: Array, tolerance: Tolerance, problem: str
) -> Comparison:
    """A comparison that cannot be made."""
    far = float("inf")
    return Comparison(*subject, case, piece, actual.shape, far, far, (), far, 0.0, 0.0, tolerance, problem)
