"""A window as a band of pieces, beside the formula: outputs, gradients, and who is left to other ways."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from mistral_torch import attention, bands
from mistral_torch.attention import Visibility

B, N, K, H = 3, 4, 2, 8


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    for name, value in {"LONG": 2, "LEAST": 1, "COLUMNS": 5}.items():
        monkeypatch.setattr(bands, name, value)


def orders(T, past=0, padding=False):
    """Orders of queries and keys: of three rows; with padding one begins late and one is padding alone."""
    order = torch.arange(past + T).repeat(B, 1)
    if padding:
        order = (order - torch.tensor([0, past + 2, past + T])[:, None]).clamp(min=-1)
    return order[:, past:], order


def seen(T, window, *, past=0, padding=False, documents=None):
    query, key = orders(T, past, padding)
    return Visibility(query, query if past == 0 else key, window, documents)


def arrays(visibility, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T, S = visibility.query_order_BT.shape[1], visibility.key_order_BS.shape[1]
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def outputs(attend, visibility, given, **options):
    """The output, and the gradients of queries, keys and values."""
    *leaves, upstream = *(x.clone().requires_grad_() for x in given[:3]), given[3]
    o = attend(*leaves, visibility, options.get("dropout", 0.0))[0]
    return [o, *torch.autograd.grad(o, leaves, upstream.to(o.dtype))]


def in_bands(visibility):
    runs = bands.runs_of(*visibility[:4])
    assert runs is not None
    return visibility._replace(runs=runs)


CASES = [(T, W, past) for T in (2, 6, 17) for W in (None, 1, 3, 5, 7, 40) for past in (0, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bands_are_the_formula(dtype):
    """Of windows of less, just as much and more than a block and a text, after tokens of a cache or none."""
    for (T, window, past), padding in [(case, padding) for case in CASES for padding in (False, True)]:
        visibility = seen(T, window, past=past, padding=padding)
        given = arrays(visibility, dtype)
        got = outputs(attention.attend_sdpa, in_bands(visibility), given)
        expected = outputs(attention.attend_eager, visibility, given)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=4e-6, rtol=0, msg=lambda m, at=(T, window, past): f"{at}: {m}")
        assert not got[0][visibility.query_order_BT < 0].any(), "padding sees nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_floats_are_summed_as_large_ones(dtype):
    """The kernel rounds its weights, and each piece what it gives: here 2.9 times as far off as the formula at most."""
    visibility = seen(17, 7, padding=True)
    given = arrays(visibility, dtype)
    exact = outputs(attention.attend_eager, visibility, [x.float() for x in given])
    got = outputs(attention.attend_sdpa, in_bands(visibility), given)
    of_formula = outputs(attention.attend_eager, visibility, given)
    for one, other, wanted in zip(got, of_formula, exact, strict=True):
        assert one.dtype == dtype
        assert (one.float() - wanted).abs().max() <= 4 * (other.float() - wanted).abs().max()


def test_the_gradient_of_a_sum_is_one_number_in_memory():
    visibility = seen(17, 7)
    *given, upstream = arrays(visibility)
    given.append(torch.ones(()).expand(upstream.shape))
    got, expected = (
        outputs(attend, each, given)
        for attend, each in ((attention.attend_sdpa, in_bands(visibility)), (attention.attend_eager, visibility))
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=0)


def test_each_document_is_a_run():
    documents = torch.tensor([[4] * 3 + [2] * 1 + [9] * 13, [0] * 5 + [1] * 12, [0] * 17])
    visibility = seen(17, 7, padding=True, documents=documents)
    runs = in_bands(visibility).runs
    assert [run.queries for run in runs if run.row == 0] == [slice(0, 3), slice(3, 4), slice(4, 17)]
    assert [run.queries for run in runs if run.row == 1] == [slice(2, 5), slice(5, 17)]
    given = arrays(visibility)
    pairs = zip(outputs(attention.attend_sdpa, in_bands(visibility), given),
                outputs(attention.attend_eager, visibility, given), strict=True)  # fmt: skip
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=4e-6, rtol=0)
    documents[0, -1] = 4
    assert bands.runs_of(*visibility[:4]) is None, "a document goes on after another one"


def test_what_has_no_runs_is_left_to_blocks(monkeypatch):
    """Holes between tokens, small windows, short texts, and where the user says that the kernel is not to be used."""
    hole = seen(17, 7)
    hole.query_order_BT[1, 4:] -= 1
    hole.query_order_BT[1, 4] = -1
    assert bands.runs_of(*hole[:4]) is None
    with sdpa_kernel(SDPBackend.MATH):
        assert bands.runs_of(*seen(17, 7)[:4]) is None
    assert attention.prepared(seen(17, 7), "sdpa").runs is not None
    assert attention.prepared(seen(17, 7), "blocked").runs is None
    assert attention.prepared(seen(17, 7), "eager").runs is None
    monkeypatch.setattr(bands, "LEAST", 8)
    assert bands.runs_of(*seen(17, 7)[:4]) is None
    monkeypatch.setattr(bands, "LONG", 18)
    assert bands.runs_of(*seen(17, 9)[:4]) is None


def test_no_score_is_computed_of_keys_that_no_query_of_a_piece_sees(monkeypatch):
    """A block of W queries meets its own keys and W - 1 older ones, whatever the length of the text."""
    asked = []
    kernel = bands._kernel

    def told(q, k, *others):
        asked.append((q.shape[2], k.shape[2]))
        return kernel(q, k, *others)

    monkeypatch.setattr(bands, "_kernel", told)
    visibility = seen(20, 5)
    *given, _ = arrays(visibility)
    attention.attend_sdpa(*given, in_bands(visibility), 0.0)
    assert asked == ([(5, 5)] + 3 * [(5, 5), (4, 4)]) * B


def test_dropout_is_applied():
    visibility = in_bands(seen(17, 7))
    *given, _ = arrays(visibility)
    torch.manual_seed(0)
    dropped, whole = (attention.attend_sdpa(*given, visibility, p)[0] for p in (0.5, 0.0))
    assert (dropped - whole).abs().max() > 0.1


def test_mixed_precision_is_that_of_the_kernel():
    visibility = seen(17, 7)
    *given, _ = arrays(visibility)
    with torch.autocast("cpu", torch.bfloat16):
        one = attention.attend_sdpa(*given, in_bands(visibility), 0.0)[0]
        other = attention.attend_sdpa(*given, visibility, 0.0)[0]
    assert one.dtype == other.dtype == torch.bfloat16
    torch.testing.assert_close(one, other, atol=2e-2, rtol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_who_must_see_the_formula_sees_it():
    """A derivative forward, a map and traces go by a mask, of which torch knows all."""
    visibility = in_bands(seen(17, 7))
    q, k, v, tangent = arrays(visibility)

    def attend(q):
        return attention.attend_sdpa(q, k, v, visibility, 0.0)[0]

    expected, of_formula = torch.func.jvp(
        lambda q: attention.attend_eager(q, k, v, visibility, 0.0)[0], (q,), (tangent,)
    )
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        found = forward_ad.unpack_dual(attend(forward_ad.make_dual(q, tangent)))
    torch.testing.assert_close(found.primal, expected, atol=4e-6, rtol=0)
    torch.testing.assert_close(found.tangent, of_formula, atol=4e-6, rtol=0)
    for traced in (make_fx(attend)(q), torch.jit.trace(attend, (q,), check_trace=False)):
        torch.testing.assert_close(traced(tangent), attend(tangent), atol=4e-6, rtol=0)
    with sdpa_kernel(SDPBackend.MATH):
        mapped = torch.vmap(attend)(torch.stack([q, tangent]))
    torch.testing.assert_close(mapped[1], attend(tangent), atol=4e-6, rtol=0)
