"""Products in C where torch must see its own operations: derivatives forward, maps, traces and modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from mistral_core.quantization import rounding
from mistral_torch import native, products

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no kernels in C: {native.why()}"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def numbers(*shape, dtype="float32", seed=0):
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.from_numpy(drawn).to(getattr(torch, dtype))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("watched", ["dual", "jvp", "make_fx", "trace"])
def test_a_packed_product_is_seen_as_well(scheme, watched):
    group = 64 if scheme == "int8" else 32
    given = numbers(16, 64, seed=2).numpy()
    scale, _ = rounding.scales(given, scheme, group, symmetric=True)
    matrix = rounding.nearest(given, scheme, group, scale, None)
    arrays = (None if array is None else torch.from_numpy(np.array(array)) for array in matrix[1:4])
    weight = products.PackedWeight(*arrays, matrix.kind, matrix.shape, matrix.block)
    x, tangent = numbers(1, 2, 64), numbers(1, 2, 64, seed=1)

    def function(x):
        return products.packed_product(x, weight)

    expected = tangent @ products.dequantised(weight, torch.float32).T
    with torch.no_grad():
        if watched == "dual":
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
        elif watched == "jvp":
            _, found = torch.func.jvp(function, (x,), (tangent,))
        elif watched == "make_fx":
            found = make_fx(function)(x)(tangent)
        else:
            found = torch.jit.trace(function, (x,), check_trace=False)(tangent)
    torch.testing.assert_close(found, expected)


def test_a_head_in_bfloat16_is_seen_as_well():
    weight, x, tangent = (
        numbers(8, 64, dtype="bfloat16"),
        numbers(1, 64, dtype="bfloat16"),
        numbers(1, 64, dtype="bfloat16", seed=1),
    )

    def function(x):
        return products.product(x, weight, dtype=torch.float32)

    expected = tangent.float() @ weight.float().T
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(make_fx(function)(x)(tangent), expected)
