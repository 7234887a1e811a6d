"""Casts between kinds of float: exact ones keep every bit, NaN payloads too; others count what they lose."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..arrays import bits

_BLOCK = 1 << 17  # numbers looked at together: they stay in the cache


class Loss(NamedTuple):
    """What a cast to a narrower dtype did to numbers."""

    changed: int = 0
    max_abs: float = 0.0
    max_ulp: float = 0.0
    """In units of the last place at the number, of the narrower dtype."""
    overflow: int = 0
    """Finite numbers that became infinite."""
    underflow: int = 0
    """Numbers that became zero."""

    def plus(self, other: Loss) -> Loss:
        """The loss of both."""
        return Loss(
            self.changed + other.changed,
            max(self.max_abs, other.max_abs),
            max(self.max_ulp, other.max_ulp),
            self.overflow + other.overflow,
            self.underflow + other.underflow,
        )

    def __str__(self) -> str:
        return (
            f"{self.changed} numbers changed, by at most {self.max_abs:.3g} ({self.max_ulp:.3g} ulp); "
            f"{self.overflow} overflowed, {self.underflow} became zero"
        )


def widens(source: np.dtype, target: np.dtype) -> bool:
    """Whether every number of one dtype is one of the other."""
    a, b = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return bool(a.nmant <= b.nmant and a.nexp <= b.nexp)


def cast(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, Loss]:
    """`rounded`, and what that did to the numbers."""
    result = rounded(array, dtype)
    if widens(array.dtype, dtype):
        return result, Loss()
    with np.errstate(all="ignore"):
        return result, _loss(np.ascontiguousarray(array), result, ml_dtypes.finfo(dtype))


def rounded(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Each number rounded to the nearest of a dtype, ties to even; a NaN keeps its sign and the payload that fits."""
    if array.dtype == dtype:
        return array
    array = np.ascontiguousarray(array)
    with np.errstate(all="ignore"):
        result = array.astype(dtype)
        if not is_finite(array):
            nan = np.isnan(array)
            bits(result)[nan] = _nan_bits(bits(array)[nan], array.dtype, dtype)
    return result


def widened(array: np.ndarray) -> np.ndarray:
    """The float32 array of the same values, NaN payloads included."""
    return rounded(array, np.dtype(np.float32))


def narrowed(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The inverse of `widened`; None where a bit would be lost."""
    result = rounded(array, dtype)
    return result if np.array_equal(bits(widened(result)), bits(array)) else None


def between(before: np.ndarray, after: np.ndarray) -> Loss:
    """What became of numbers that come back as others, in units of the last place of the first ones' dtype."""
    with np.errstate(all="ignore"):
        return _loss(before, after, ml_dtypes.finfo(before.dtype))


def is_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    info = ml_dtypes.finfo(array.dtype)
    words = bits(array)
    magnitude = words.dtype.type((1 << (8 * array.dtype.itemsize - 1)) - 1)
    infinite = ((1 << info.nexp) - 1) << info.nmant
    return all(int((block & magnitude).max()) < infinite for block in _blocks(words))


def first_not_finite(array: np.ndarray) -> list[int] | None:
    """The index of the first NaN or infinity; None where there is none."""
    if is_finite(array):
        return None
    with np.errstate(invalid="ignore"):
        return [int(i) for i in np.unravel_index(int(np.isfinite(array).argmin()), array.shape)]


def _loss(array: np.ndarray, result: np.ndarray, info: Any) -> Loss:
    """The losses of all blocks together."""
    pairs = zip(_blocks(array), _blocks(result), strict=True)
    losses = [_loss_of_block(*_as_wide(before, after), info) for before, after in pairs]
    return functools.reduce(Loss.plus, losses, Loss())


def _loss_of_block(before: np.ndarray, after: np.ndarray, info: Any) -> Loss:
    difference = np.abs(before - after)  # NaN for NaN and for an infinity that stays
    changed = int(np.count_nonzero(difference > 0))
    if changed == 0:
        return Loss()
    overflow = np.isinf(difference)
    difference[~(difference > 0) | overflow] = 0
    exponent = np.maximum(np.frexp(before)[1] - 1, info.minexp)
    return Loss(
        changed,
        float(difference.max()),
        float(np.ldexp(difference, info.nmant - exponent).max()),
        int(np.count_nonzero(overflow)),
        int(np.count_nonzero((after == 0) & (before != 0))),
    )


def _as_wide(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in a dtype that NumPy computes in and that holds both."""
    wide = np.float64 if before.dtype == np.float64 else np.float32
    return before.astype(wide), after.astype(wide)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def _nan_bits(nan: np.ndarray, source: np.dtype, target: np.dtype) -> np.ndarray:
    """The same NaNs in another dtype: the payload's upper bits, and never the infinity of an empty payload."""
    a, b = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    wide = nan.astype(np.uint64)
    sign = wide >> np.uint64(8 * source.itemsize - 1)
    payload = wide & np.uint64((1 << a.nmant) - 1)
    shift = int(b.nmant) - int(a.nmant)
    payload = payload << np.uint64(shift) if shift >= 0 else np.maximum(payload >> np.uint64(-shift), np.uint64(1))
    exponent = np.uint64(((1 << b.nexp) - 1) << b.nmant)
    return ((sign << np.uint64(8 * target.itemsize - 1)) | exponent | payload).astype(f"u{target.itemsize}")
