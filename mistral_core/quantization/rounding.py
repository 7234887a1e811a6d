"""A matrix of floats as one of few bits: the nearest codes, once the scales are chosen."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ..errors import NonFiniteWeightsError
from ..threads import Threads, processors
from .matrix import KINDS, NF4, ROWS, PackedMatrix, packed_codes

_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
"""Where the nearest of two neighbours changes."""
_SMALLEST_LARGEST = np.float32(1e-38)
"""The largest of a block whose own is smaller, where it is divided by: bitsandbytes' quantize_4bit."""
_ALONE = 1 << 22
"""Numbers of a matrix that one processor packs faster than several."""
_NESTED = 256
"""Scales of nf4 that share a scale themselves."""


def check_finite(name: str, numbers: np.ndarray) -> None:
    """Raise NonFiniteWeightsError for a matrix that holds NaN or infinity, or whose scales do, as they do then."""
    if not np.isfinite(numbers.astype(np.float32)).all():
        raise NonFiniteWeightsError(f"{name}: holds NaN or infinity, which cannot be packed; correct the weights.")


def scales(
    matrix: np.ndarray, kind: str, group: int, *, symmetric: bool = True, dtype: np.dtype | type = np.float32
) -> tuple[np.ndarray, np.ndarray | None]:
    """The scales [O, I / group] of a matrix [O, I] in `dtype`, and zero points unless symmetric.

    Symmetric: max|w| / ((2^bits - 1) / 2). Else from the least to the largest, 0 among them, in 2^bits - 1 steps, so
    that 0 is a code. As compressed-tensors 0.20 (quantization/utils/helpers.py) does; a scale of 0 becomes the dtype's
    eps. nf4: max|w| of the block (QLoRA, section 3).
    """
    least, most = _extremes(matrix, group)
    largest = np.abs(np.maximum(most, -least))  # of zeros it would be -0
    if kind == "nf4":
        return largest, None
    steps, eps = (1 << KINDS[kind].bits) - 1, ml_dtypes.finfo(dtype).eps
    if symmetric:
        scale = (largest / np.float32(steps / 2)).astype(dtype)
        scale[scale == 0] = eps
        return scale, None
    scale = ((most - least) / np.float32(steps)).astype(dtype)
    scale[scale == 0] = eps
    low = -(steps + 1) // 2
    zero = np.clip(np.rint(low - least / scale.astype(np.float32)), low, low + steps)
    return scale, zero.astype(np.int8)


def _extremes(matrix: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of each group and 0, in float32; a NaN is both."""
    shape = len(matrix), matrix.shape[1] // group
    least, most = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def of_rows(part: slice) -> None:
        with np.errstate(invalid="ignore"):  # a NaN that comes through is told of by the one who asks
            groups = matrix[part].astype(np.float32).reshape(-1, shape[1], group)
            least[part], most[part] = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)

    _in_strips(matrix, of_rows)
    return least, most


def _in_strips(matrix: np.ndarray, work: Callable[[slice], None]) -> None:
    """Do something with some rows after others, whose floats stay in the cache, on all processors if they are many."""
    parts = [slice(start, min(start + ROWS, len(matrix))) for start in range(0, len(matrix), ROWS)]
    if matrix.size < _ALONE:
        for part in parts:
            work(part)
        return
    with Threads(processors()) as threads:
        for _ in threads.map(work, parts):
            pass


def nearest(
    matrix: np.ndarray, kind: str, group: int, scale: np.ndarray, zero: np.ndarray | None = None
) -> PackedMatrix:
    """The codes whose values are nearest under given scales; halves go to the even integer, or the lower value."""
    rows, columns = matrix.shape
    numbers = np.empty((rows, columns), np.uint8)

    def of_rows(part: slice) -> None:
        numbers[part] = codes(matrix[part], kind, group, scale[part], None if zero is None else zero[part])

    _in_strips(matrix, of_rows)
    return PackedMatrix(kind, packed_codes(kind, numbers), scale, zero, (rows, columns), (1, group))


def codes(matrix: np.ndarray, kind: str, group: int, scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
    """The unsigned codes [O, I] of rows, or of some columns of them whose scales are given."""
    groups = matrix.astype(np.float32).reshape(len(matrix), -1, group)
    factor = scale.astype(np.float32)[..., None]
    if kind == "nf4":
        return _nearest_of_sixteen(groups * (1 / np.maximum(factor, _SMALLEST_LARGEST))).reshape(matrix.shape)
    low = -(1 << KINDS[kind].bits - 1)
    numbers = groups / factor
    if zero is not None:  # before the halves are rounded, as compressed-tensors does it
        numbers += zero[..., None]
    return (np.clip(np.rint(numbers), low, -low - 1) - low).astype(np.uint8).reshape(matrix.shape)


def _nearest_of_sixteen(x: np.ndarray) -> np.ndarray:
    """How many midpoints lie below each number, which is the nearest value's place: bitsandbytes' tree of questions."""
    result = np.zeros(x.shape, np.uint8)
    for between in _BETWEEN:
        result += x > between
    return result


# The scales of nf4 in eight bits


def nested_map() -> np.ndarray:
    """The 256 values of bitsandbytes' dynamic map: seven decades, each finer than the last, signs, 0 and 1.

    From its functional.create_dynamic_map (T. Dettmers, 8-Bit Approximations for Parallelism in Deep Learning); the
    edges are those of torch.linspace in float32, which counts from the nearer end.
    """
    values, first = [0.0, 1.0], np.float64(np.float32(0.1))
    for decade in range(7):
        parts = 2**decade
        step, places = np.float64(np.float32(1 - first)) / parts, np.arange(parts + 1)
        edges = np.where(2 * places < parts, first + step * places, 1 - step * (parts - places)).astype(np.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * np.float32(10.0 ** (decade - 6))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(values, np.float32))


def nested(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Scales as bitsandbytes' double quantisation stores them: uint8 codes, float32 scales of 256, and their mean."""
    flat = scale.reshape(-1)
    offset = np.float32(flat.mean(dtype=np.float64))
    blocks = np.pad(flat - offset, (0, -flat.size % _NESTED)).reshape(-1, _NESTED)
    outer = np.abs(blocks).max(-1)
    table = nested_map()
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(outer[:, None] == 0, 0, blocks / outer[:, None])
    found = np.searchsorted((table[1:] + table[:-1]) / 2, x).astype(np.uint8)
    return found.reshape(-1)[: flat.size], outer, offset


def doubled(scale: np.ndarray) -> np.ndarray:
    """Scales as they come back from double quantisation."""
    return unnested(*nested(scale)).reshape(scale.shape)


def unnested(numbers: np.ndarray, outer: np.ndarray, offset: np.float32) -> np.ndarray:
    """The scales that double quantisation keeps: map[code] * outer + offset."""
    result: np.ndarray = nested_map()[numbers] * outer[np.arange(numbers.size) // _NESTED] + offset
    return result
