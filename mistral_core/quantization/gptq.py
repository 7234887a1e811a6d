"""GPTQ: codes that make up for the rounding of the columns before them, by what the columns are multiplied with.

Of a matrix W [O, I] and inputs X [tokens, I], the codes Q should make |(W - Q) X^T|^2 = sum_o e_o H e_o^T small, where
e = W - Q and H = X^T X. With H = R R^T, R an upper triangle, this is |e R|^2, whose column j is

    R_jj (w_j + sum_{i<j} e_i R_ij / R_jj - q_j),

so that columns are rounded one after the other, each by what the ones before it left. It is GPTQ (arXiv 2210.17323,
algorithm 1), which says the same by the inverse of H: arXiv 2507.18553, theorem 4. Neither the inverse nor a second
factor is made here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import InputError, NonFiniteInputError
from ..telling import warn
from . import rounding
from .matrix import KINDS, PackedMatrix, dequantised, packed_codes

DAMPENING = 0.01
"""Of the mean of the Hessian's diagonal, added to it all (section 3.3, step 3)."""
COLUMNS = 128
"""Columns that are rounded before those after them hear of it (section 3.3, step 2)."""
ROWS = 4096
"""Rows are calibrated in so many at once: no row knows of another."""
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.05, 1.1)
"""Of a scale of four bits, those that are tried; above 1 there is room for what columns make up for."""
STEP_ROWS = 128
"""Rows whose scales are sought at once."""
_BLOCK = 512
"""Columns of a Hessian that are factored at once."""


class Factors(NamedTuple):
    """What GPTQ has to know of the inputs of a matrix, shared by all that are multiplied with the same."""

    order: np.ndarray
    """int [I]: the columns as they are rounded, those with the largest inputs first."""
    upper_II: np.ndarray
    """float32: R_ij / R_jj of the columns in this order."""
    diagonal_I: np.ndarray
    """float64: the sum of squares of each column's inputs, in the order of the matrix."""


def factors(hessian_II: np.ndarray, *, name: str = "the matrix", dampening: float = DAMPENING) -> Factors:
    """The factors of a Hessian, the sum X^T X in float64 over the inputs X of the matrices that `name` tells of.

    A column whose inputs were always 0 is rounded to the nearest. Where the Hessian is no positive one, dampening is
    raised, which is told. Raises NonFiniteInputError, and InputError where no dampening helps.
    """
    diagonal = hessian_II.diagonal().astype(np.float64)
    if not np.isfinite(hessian_II).all():
        raise NonFiniteInputError(
            f"{name}: the inputs on this text must be finite, and so their squares; correct the weights before them."
        )
    order = np.argsort(-diagonal, kind="stable")
    most = max(10.0 * dampening, 1.0)
    tried = dampening
    while tried <= most:
        upper = hessian_II[np.ix_(order[::-1], order[::-1])]  # backwards, for a lower triangle is made
        added = tried * diagonal.mean()
        np.fill_diagonal(upper, np.where(diagonal == 0, 1, diagonal + added)[order[::-1]])
        try:
            _lower_triangle(upper)
        except np.linalg.LinAlgError:
            tried *= 10
            continue
        if tried != dampening:
            warn(
                f"{name}: the Hessian was no positive one; dampened by {tried:g} of its mean instead of {dampening:g}."
            )
        backwards = upper[::-1, ::-1]
        result = np.empty(upper.shape, np.float32)
        np.divide(backwards, backwards.diagonal(), out=result, casting="same_kind")
        return Factors(order, result, diagonal)
    raise InputError(f"{name}: the Hessian must be the sum of X^T X over inputs X; it is not positive.")


def _lower_triangle(a: np.ndarray) -> None:
    """Put L of a = L L^T into the lower triangle of `a`; raises LinAlgError where it is not positive.

    NumPy's own makes two more copies of what has 1.6 GB in a 7B.
    """
    for start in range(0, len(a), _BLOCK):
        block, below = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
        a[start:, block] -= a[start:, :start] @ a[block, :start].T
        a[block, block] = np.linalg.cholesky(a[block, block])
        a[below, block] = np.linalg.solve(a[block, block], a[below, block].T).T


def scales(
    matrix: np.ndarray,
    found: Factors,
    kind: str,
    group: int,
    *,
    symmetric: bool = True,
    dtype: np.dtype | type = np.float32,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales and zero points as `rounding.scales` gives them, times the factor that does each group least harm.

    The harm is that of the nearest codes, each number's square times that of its inputs. Of eight bits no factor is
    better than 1 by more than chance.
    """
    factors = FACTORS if KINDS[kind].bits == 4 else FACTORS[:1]
    parts = []
    for start in range(0, len(matrix), STEP_ROWS):
        rows = matrix[start : start + STEP_ROWS].astype(np.float32)
        tried = [rounding.scales(rows * factor, kind, group, symmetric=symmetric, dtype=dtype) for factor in factors]
        harm = [_harm(rows, rounding.nearest(rows, kind, group, *each), found.diagonal_I) for each in tried]
        best = np.argmin(harm, axis=0)
        zeros = [zero for _, zero in tried if zero is not None]
        parts.append((np.choose(best, [scale for scale, _ in tried]), np.choose(best, zeros) if zeros else None))
    zeros = [zero for _, zero in parts if zero is not None]
    return np.concatenate([scale for scale, _ in parts]), np.concatenate(zeros) if zeros else None


def _harm(rows: np.ndarray, packed: PackedMatrix, diagonal_I: np.ndarray) -> np.ndarray:
    """[O, groups]."""
    squares = (dequantised(packed) - rows) ** 2 * diagonal_I
    return squares.reshape(len(rows), -1, packed.block[1]).sum(-1)


def calibrated(
    matrix: np.ndarray,
    found: Factors,
    kind: str,
    group: int,
    scale: np.ndarray,
    zero: np.ndarray | None = None,
) -> PackedMatrix:
    """The codes of a matrix [O, I] under given scales that change its products with the inputs least.

    As `rounding.nearest` gives them, which is the same where the Hessian has a diagonal only: groups are those of
    neighbouring columns, whatever the order that columns are rounded in.
    """
    rows, columns = matrix.shape
    numbers = np.empty((rows, columns), np.uint8)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        numbers[part] = _codes(matrix[part], found, kind, group, scale[part], None if zero is None else zero[part])
    return PackedMatrix(kind, packed_codes(kind, numbers), scale, zero, (rows, columns), (1, group))


def _codes(
    matrix: np.ndarray, found: Factors, kind: str, group: int, scale: np.ndarray, zero: np.ndarray | None
) -> np.ndarray:
    """The unsigned codes [O, I] of some rows; inside, columns lie as rows in the order that they are rounded in."""
    weights_IO = matrix.astype(np.float32).T[found.order]
    numbers_IO = np.empty(weights_IO.shape, np.uint8)
    left_IO = np.empty_like(weights_IO)  # W - Q
    for start in range(0, len(weights_IO), COLUMNS):
        block = slice(start, start + COLUMNS)
        aim = weights_IO[block] + found.upper_II[:start, block].T @ left_IO[:start]
        upper = found.upper_II[block, block]
        for each in range(len(aim)):
            column = start + each
            of_group = slice(found.order[column] // group, found.order[column] // group + 1)
            offset = None if zero is None else zero[:, of_group]
            codes = rounding.codes(aim[each][:, None], kind, 1, scale[:, of_group], offset)[:, 0]
            value = KINDS[kind].values[codes] if offset is None else KINDS[kind].values[codes] - offset[:, 0]
            numbers_IO[column] = codes
            left_IO[column] = weights_IO[column] - value * scale[:, of_group.start].astype(np.float32)
            aim[each + 1 :] += upper[each, each + 1 :, None] * left_IO[column]
    numbers = np.empty((weights_IO.shape[1], len(weights_IO)), np.uint8)
    numbers[:, found.order] = numbers_IO.T
    return numbers
