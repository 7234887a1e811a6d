"""The norm, the rotation and the gate in C: the specification's numbers, where nobody must see operations of torch."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from conformance import suite
from conformance.compare import compare
from conformance.tolerances import tolerance
from mistral_core.native import between as in_c
from mistral_core.reference import ops
from mistral_torch import between, layers, native

pytestmark = [
    pytest.mark.skipif(in_c.functions() is None, reason=f"no kernels in C: {native.why()}"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SIZES = (1, 2, 7, 16, 33, 64, 100)
"""Sixteen numbers are computed at once: less, just as many, some and no whole number of them."""
DTYPES = ("float32", "bfloat16")
SUBJECT = ("torch", "eager")


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(between, "LEAST", 0)


@pytest.fixture
def asked(monkeypatch):
    """The names of the functions of C that computed something, as they do."""
    found = []
    run = between._run

    def told(function, *given):
        found.append(function.__name__)
        run(function, *given)

    monkeypatch.setattr(between, "_run", told)
    return found


def numbers(*shape, dtype="float32", seed=0):
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return torch.from_numpy(drawn).to(getattr(torch, dtype))


def exact(x):
    return x.double().numpy()


def as_numpy(x):
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def assert_piece(piece, dtype, found, wanted):
    result = compare((*SUBJECT, dtype), "in C", piece, as_numpy(found), wanted, tolerance(piece, dtype, "eager"))
    assert result.passed, result


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_each_is_the_specification_s(asked, dtype, size):
    rounds = ops.rounding(dtype)
    # rows enough for several parts, and no whole number of them
    x, weight = numbers(3, 341, size, dtype=dtype), numbers(size, dtype=dtype, seed=1)
    normed = ops.rms_norm(exact(x), exact(weight), 1e-5, round=rounds)
    assert_piece("rms_norm", dtype, layers.rms_norm(x, weight, 1e-5), normed)
    heads = numbers(3, 341, 3, 2 * size, dtype=dtype)
    cos, sin = numbers(3, 341, size, seed=2), numbers(3, 341, size, seed=3)
    turned = ops.rotate(exact(heads), exact(cos), exact(sin), round=rounds)
    assert_piece("rotate", dtype, layers.rotate(heads, cos, sin), turned)
    gate, up = 4 * numbers(3, 341, size, dtype=dtype, seed=4), numbers(3, 341, size, dtype=dtype, seed=5)
    assert_piece("mlp", dtype, layers.gated(gate, up), rounds(rounds(ops.silu(exact(gate))) * exact(up)))
    assert asked == ["mistral_rms_norm", "mistral_rotate", "mistral_gated"]


CHECKS = [name for name, check in suite.CHECKS.items() if check.suits("sdpa", "float32")
          and name.split()[0] in ("whole", "blocks", "cached", "padding")]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_models_agree_with_the_specification(asked, dtype):
    subject = suite.subject("torch", "sdpa", dtype)
    for name in CHECKS:
        if suite.CHECKS[name].suits("sdpa", dtype):
            assert not [each for each in suite.CHECKS[name].run(subject) if not each.passed], name
    assert set(asked) == {"mistral_rms_norm", "mistral_rotate", "mistral_gated"}


@torch.no_grad()
def test_what_is_no_number_stays_none():
    for dtype in map(native.OWN.__getitem__, range(2)):
        x = torch.ones(1, 3, 40, dtype=dtype)
        x[0, 1, 5] = torch.nan
        rows = layers.rms_norm(x, x[0, 0], 1e-5).isnan().all(-1), layers.gated(x, x).isnan().any(-1)
        assert [row[0].tolist() for row in rows] == [[False, True, False]] * 2


CALLS = {
    "rms_norm": lambda x: layers.rms_norm(x, torch.ones(64, dtype=x.dtype), 1e-5),
    "rotate": lambda x: layers.rotate(x[:, :, None], torch.ones(1, 8, 32), torch.zeros(1, 8, 32)),
    "gated": lambda x: layers.gated(x, x),
}


@pytest.mark.parametrize("name", CALLS)
def test_who_must_see_operations_of_torch_sees_them(asked, name):
    """Derivatives, maps, traces and modes: what C computes would be a constant to them, without a word."""
    function, x, tangent = CALLS[name], numbers(1, 8, 64), numbers(1, 8, 64, seed=1)
    _, expected = torch.func.jvp(function, (x,), (tangent,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        traced = make_fx(function)(x), torch.jit.trace(function, (x,), check_trace=False)
        torch.vmap(function)(torch.stack([x, tangent]))
        assert not asked, "C computed what was traced or mapped"
        for each in traced:
            torch.testing.assert_close(each(tangent), function(tangent))
    assert asked


@torch.no_grad()
def test_other_shapes_and_dtypes_are_the_formula_s(asked):
    x = numbers(2, 8, 64)
    layers.rms_norm(x, torch.ones(1), 1e-5)
    layers.rms_norm(x.bfloat16(), torch.ones(64), 1e-5)
    layers.rms_norm(x.transpose(0, 1), torch.ones(64), 1e-5)
    layers.rotate(x[:, :, None], torch.ones(1, 8, 32), torch.zeros(1, 8, 32))
    layers.rotate(x[:, :, None], torch.ones(2, 8, 32).double(), torch.zeros(2, 8, 32).double())
    layers.gated(x, x[:, :1])
    layers.gated(x, x.bfloat16())
    layers.gated(x.double(), x.double())
    assert not asked
