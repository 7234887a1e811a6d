"""Rows times a matrix: each way that a processor is given, by rows, lengths and dtypes, is the same product."""

from __future__ import annotations

import importlib

import ml_dtypes
import numpy as np
import pytest

from conformance import adapters
from conformance.compare import eps_of

LENGTHS = (6, 2048, 2304, 4095, 4096, 6145)
"""About where XLA's ways of a single row begin and end, and one that divides into no equal pieces."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 3)])
def test_a_product_is_accumulated_in_float32_and_rounded_once(backend, shape, dtype):
    adapter = adapters.get(backend.__name__.removeprefix("mistral_"))
    product = importlib.import_module(f"{backend.__name__}.products").product
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    for length in LENGTHS:
        arrays = [rng.normal(size=size).astype(kind) for size in ((*shape, length), (5, length), (5,))]
        x, weight, bias = (array.astype(np.float64) for array in arrays)
        given = [adapter.array(array.astype(np.float32), dtype) for array in arrays]
        sizes = np.abs(x) @ np.abs(weight).T  # what float32 sums may lose, in steps of its own
        for bias_given, wanted in (([], x @ weight.T), ([given[2]], x @ weight.T + bias)):
            wide = adapter.numpy(product(*given[:2], *bias_given, dtype=adapter.array(1, "float32").dtype))
            assert wide.dtype == np.float32
            assert (np.abs(wide - wanted) <= 4 * eps_of("float32") * sizes).all(), length
            own = adapter.numpy(product(*given[:2], *bias_given))
            assert own.dtype == kind
            rounded = eps_of(dtype) * np.abs(wanted) + 4 * eps_of("float32") * sizes
            assert (np.abs(own.astype(np.float64) - wanted) <= rounded).all(), length
