"""GPTQ against the paper's own loop, which is slow and needs the inverse, and what it promises beside the nearest."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from mistral_core.errors import InputError, NonFiniteInputError
from mistral_core.quantization import gptq, rounding
from mistral_core.quantization.matrix import KINDS, dequantised, unsigned

ROWS, COLUMNS = 24, 304
LAYOUTS = [
    ("int4", 16, True),
    ("int4", 16, False),
    ("int4", COLUMNS, True),
    ("int4", COLUMNS, False),
    ("int8", COLUMNS, True),
    ("int8", 16, False),
    ("nf4", 16, True),
]


def drawn(seed=0, *, columns=COLUMNS):
    """A matrix in bfloat16 and the Hessian of inputs that have something to do with each other."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(columns, columns)) / np.sqrt(columns) + np.diag(generator.uniform(0.1, 2, columns))
    inputs = generator.normal(size=(2 * columns, columns)) @ mixing
    matrix = generator.normal(size=(ROWS, columns)) * 0.02
    return matrix.astype(ml_dtypes.bfloat16), inputs.T @ inputs


def plain_scales(matrix, kind, group, symmetric):
    return rounding.scales(matrix, kind, group, symmetric=symmetric, dtype=matrix.dtype)


def rounded(column, kind, scale, zero):
    """The code of each number, and what it stands for, in float64."""
    values = KINDS[kind].values.astype(np.float64)[None] - (0 if zero is None else zero.astype(np.float64)[:, None])
    values = values * scale.astype(np.float64)[:, None]
    codes = np.abs(values - column[:, None]).argmin(axis=1)
    return codes, np.take_along_axis(values, codes[:, None], 1)[:, 0]


def as_in_the_paper(matrix, hessian, kind, group, scale, zero):
    """Algorithm 1, a column at a time, all that is not rounded yet being corrected by the inverse's factor."""
    columns = len(hessian)
    order = np.argsort(-hessian.diagonal(), kind="stable")
    damped = hessian + gptq.DAMPENING * hessian.diagonal().mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    left = matrix.astype(np.float64)[:, order]
    codes = np.empty(matrix.shape, np.uint8)
    for place, column in enumerate(order):
        offset = None if zero is None else zero[:, column // group]
        codes[:, column], values = rounded(left[:, place], kind, scale[:, column // group], offset)
        error = (left[:, place] - values) / upper[place, place]
        left[:, place:] -= error[:, None] * upper[place, place:]
    return codes


def harm(packed, matrix, hessian):
    error = dequantised(packed) - matrix.astype(np.float64)
    return np.einsum("oi,ij,oj->", error, hessian, error)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_codes_are_those_of_the_paper(layout):
    kind, group, symmetric = layout
    matrix, hessian = drawn()
    scale, zero = plain_scales(matrix, kind, group, symmetric)
    packed = gptq.calibrated(matrix, gptq.factors(hessian), kind, group, scale, zero)
    np.testing.assert_array_equal(unsigned(packed), as_in_the_paper(matrix, hessian, kind, group, scale, zero))
    assert (packed.kind, packed.shape, packed.block) == (kind, matrix.shape, (1, group))
    assert packed.scale is scale
    assert packed.zero is zero


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_harms_less_than_the_nearest_codes(layout):
    kind, group, symmetric = layout
    matrix, hessian = drawn(1)
    scale, zero = plain_scales(matrix, kind, group, symmetric)
    packed = gptq.calibrated(matrix, gptq.factors(hessian), kind, group, scale, zero)
    nearest = rounding.nearest(matrix, kind, group, scale, zero)
    assert harm(packed, matrix, hessian) < 0.5 * harm(nearest, matrix, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_are_sought_harm_less_than_plain_ones(symmetric):
    matrix, hessian = drawn(1)
    found = gptq.factors(hessian)
    plain = plain_scales(matrix, "int4", COLUMNS, symmetric)
    sought = gptq.scales(matrix, found, "int4", COLUMNS, symmetric=symmetric, dtype=matrix.dtype)
    first, second = (gptq.calibrated(matrix, found, "int4", COLUMNS, *each) for each in (plain, sought))
    assert harm(second, matrix, hessian) < 0.95 * harm(first, matrix, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_eight_bits_are_the_plain_ones(symmetric):
    matrix, hessian = drawn(1)
    plain = plain_scales(matrix, "int8", 16, symmetric)
    sought = gptq.scales(matrix, gptq.factors(hessian), "int8", 16, symmetric=symmetric, dtype=matrix.dtype)
    for one, other in zip(plain, sought, strict=True):
        assert (one is None and other is None) or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_inputs_that_have_nothing_to_do_with_each_other_give_the_nearest_codes(layout):
    kind, group, symmetric = layout
    matrix, hessian = drawn(2)
    scale, zero = plain_scales(matrix, kind, group, symmetric)
    packed = gptq.calibrated(matrix, gptq.factors(np.diag(hessian.diagonal())), kind, group, scale, zero)
    np.testing.assert_array_equal(packed.codes, rounding.nearest(matrix, kind, group, scale, zero).codes)


def test_columns_whose_inputs_are_zero_are_rounded_to_the_nearest_and_change_no_other():
    matrix, hessian = drawn(3)
    dead = np.zeros(COLUMNS, bool)
    dead[[0, 5, 6, 200, COLUMNS - 1]] = True
    hessian[dead] = hessian[:, dead] = 0
    scale, zero = plain_scales(matrix, "int4", COLUMNS, True)
    found = unsigned(gptq.calibrated(matrix, gptq.factors(hessian), "int4", COLUMNS, scale, zero))
    nearest = unsigned(rounding.nearest(matrix, "int4", COLUMNS, scale, zero))
    np.testing.assert_array_equal(found[:, dead], nearest[:, dead])
    alive = hessian[~dead][:, ~dead]
    # the mean of the diagonal counts the dead ones
    dampening = gptq.DAMPENING * len(alive) / COLUMNS
    others = gptq.calibrated(
        matrix[:, ~dead], gptq.factors(alive, dampening=dampening), "int4", len(alive), scale, zero
    )
    np.testing.assert_array_equal(found[:, ~dead], unsigned(others))
    nothing = gptq.calibrated(matrix, gptq.factors(np.zeros_like(hessian)), "int4", COLUMNS, scale, zero)
    np.testing.assert_array_equal(unsigned(nothing), nearest)


def test_the_order_of_columns_is_that_of_the_matrix_whatever_they_are_rounded_in():
    matrix, hessian = drawn(4)
    scale, _ = plain_scales(matrix, "int4", COLUMNS, True)
    moved = np.random.default_rng(0).permutation(COLUMNS)
    first = gptq.calibrated(matrix, gptq.factors(hessian), "int4", COLUMNS, scale)
    second = gptq.calibrated(matrix[:, moved], gptq.factors(hessian[moved][:, moved]), "int4", COLUMNS, scale)
    np.testing.assert_array_equal(unsigned(first)[:, moved], unsigned(second))


def test_a_hessian_is_factored_in_blocks(monkeypatch):
    monkeypatch.setattr(gptq, "_BLOCK", 100)
    _, hessian = drawn(5)
    kept = hessian.copy()
    order, upper, diagonal = gptq.factors(hessian)
    np.testing.assert_array_equal(hessian, kept)
    np.testing.assert_array_equal(diagonal, hessian.diagonal())
    assert (np.diff(diagonal[order]) <= 0).all()
    damped = hessian + gptq.DAMPENING * diagonal.mean() * np.eye(COLUMNS)
    backwards = np.linalg.cholesky(damped[order[::-1]][:, order[::-1]])[::-1, ::-1]
    wanted = backwards / backwards.diagonal()
    np.testing.assert_allclose(np.triu(upper), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_rows_know_nothing_of_each_other_and_the_same_arguments_give_the_same_bytes(monkeypatch):
    matrix, hessian = drawn(6)
    found = gptq.factors(hessian)
    results = []
    for rows, step in ((gptq.ROWS, gptq.STEP_ROWS), (gptq.ROWS, gptq.STEP_ROWS), (7, 5)):
        monkeypatch.setattr(gptq, "ROWS", rows)
        monkeypatch.setattr(gptq, "STEP_ROWS", step)
        sought = gptq.scales(matrix, found, "int4", 16, symmetric=False, dtype=matrix.dtype)
        results.append(gptq.calibrated(matrix, gptq.factors(hessian), "int4", 16, *sought))
    for other in results[1:]:
        assert other.codes.tobytes() == results[0].codes.tobytes()
        assert other.scale.tobytes() == results[0].scale.tobytes()
        assert other.zero.tobytes() == results[0].zero.tobytes()


@pytest.mark.parametrize(("kind", "symmetric"), [("int4", True), ("int4", False), ("nf4", True)])
def test_each_scale_is_the_best_of_those_that_are_tried(kind, symmetric):
    matrix, hessian = drawn(7)
    matrix[:, 3] *= 9
    dtype = np.float32 if kind == "nf4" else matrix.dtype
    scale, zero = gptq.scales(matrix, gptq.factors(hessian), kind, 16, symmetric=symmetric, dtype=dtype)
    assert scale.dtype == dtype
    chosen = set()
    for row in range(3):
        for group in range(COLUMNS // 16):
            part = slice(16 * group, 16 * group + 16)
            numbers, weight = matrix[row, part].astype(np.float32), hessian.diagonal()[part]

            def cost(factor, numbers=numbers, weight=weight):
                one, offset = rounding.scales(
                    numbers[None] * np.float32(factor), kind, 16, symmetric=symmetric, dtype=dtype
                )
                _, values = rounded(
                    numbers.astype(np.float64), kind, one.repeat(16), offset if offset is None else offset.repeat(16)
                )
                return ((values - numbers) ** 2 * weight).sum(), one[0, 0], offset if offset is None else offset[0, 0]

            costs = {factor: cost(factor) for factor in gptq.FACTORS}
            best = min(costs, key=lambda factor: costs[factor][0])
            chosen.add(best)
            assert scale[row, group] == costs[best][1]
            assert zero is None or zero[row, group] == costs[best][2]
    assert min(chosen) < 1 < max(chosen)


def test_a_hessian_that_is_not_positive_is_dampened_more_and_told():
    matrix, hessian = drawn(8)
    values, vectors = np.linalg.eigh(hessian)
    values[0] = -0.05 * hessian.diagonal().mean()
    almost = vectors * values @ vectors.T
    with pytest.warns(UserWarning, match=r"up_proj: the Hessian was no positive one; dampened by 0.1 .* of 0.01"):
        found = gptq.factors(almost, name="up_proj")
    scale, _ = plain_scales(matrix, "int4", 16, True)
    packed = gptq.calibrated(matrix, found, "int4", 16, scale)
    assert harm(packed, matrix, hessian) < harm(rounding.nearest(matrix, "int4", 16, scale), matrix, hessian)
    values[0] = -3 * hessian.diagonal().mean()
    with pytest.raises(InputError, match=r"up_proj: the Hessian must be the sum of X\^T X"):
        gptq.factors(vectors * values @ vectors.T, name="up_proj")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_names_the_matrix(bad):
    _, hessian = drawn(9)
    hessian[7, 9] = hessian[9, 7] = bad
    with pytest.raises(NonFiniteInputError, match=r"up_proj: the inputs on this text must be finite"):
        gptq.factors(hessian, name="up_proj")
