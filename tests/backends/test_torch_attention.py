"""Attention in PyTorch: the fused kernels against the formula, and dropout."""

from __future__ import annotations

import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import MissingExtraError, UnsupportedFeatureError
from mistral_torch import KVCache, MistralForCausalLM, attention, native
from mistral_torch.attention import Visibility, attend
from mistral_torch.cache import place, remember
from mistral_torch.products import product

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, TINY.vocab_size, (3, 17)))
MASK = torch.ones_like(IDS)
MASK[0, :4], MASK[1, 12:], MASK[2, [2, 3, 9]] = 0, 0, 0  # left, right, holes
DOCUMENTS = torch.tensor([[5] * 9 + [2] * 8, [0] * 17, [1] * 3 + [4] * 11 + [1000] * 3])
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")
WINDOWS = pytest.mark.parametrize("window", [None, 5, 1])

flex_feature = pytest.mark.feature("FlexAttention")
flash_feature = pytest.mark.feature("FlashAttention 2", note="unverified: needs an NVIDIA GPU with flash-attn")


def make(config=TINY, **options):
    return MistralForCausalLM(config, **options).load_arrays(PARAMETERS).eval()


def qkv(dtype=torch.float32, *, requires_grad=""):
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (3, 17, 6, 16), "k": (3, 17, 2, 16), "v": (3, 17, 2, 16)}
    arrays = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return [array.requires_grad_(name in requires_grad) for name, array in arrays.items()]


def order_of(mask):
    return torch.where(mask != 0, mask.cumsum(1) - 1, -1)


def attended(implementation, *arrays, mask=MASK, window=None, documents=None, **options):
    visibility = Visibility(order_of(mask), order_of(mask), window, documents)
    return attend(*arrays, visibility, implementation=implementation, **options)[0]


def in_chunks(model, lengths, *, capacity=None, rolling=True):
    """The logits of the whole text, read chunk by chunk through a cache."""
    cache = KVCache.allocate(model.config, len(IDS), capacity, rolling=rolling, dtype=model.dtype)
    logits = []
    with torch.no_grad():
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            new = slice(start, start + length)
            out = model(IDS[:, new], MASK[:, new], past_key_values=cache)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def real(x):
    return x[MASK != 0].float()


# FlexAttention


@flex_feature
@WINDOWS
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_flex_is_the_formula(window, documents):
    flex, eager = (attended(name, *qkv(), window=window, documents=documents) for name in ("flex", "eager"))
    assert torch.allclose(flex, eager, atol=1e-6)
    assert (flex[MASK == 0] == 0).all()


@flex_feature
@pytest.mark.parametrize("options", [{}, {"capacity": 17}, {"capacity": 17, "rolling": False}])
def test_flex_with_a_cache(options):
    expected = make(attn_implementation="eager")(IDS, MASK).logits
    assert torch.allclose(
        real(in_chunks(make(attn_implementation="flex_attention"), [7, 1, 9], **options)), real(expected), atol=2e-5
    )


@flex_feature
@pytest.mark.parametrize("trained", ["qkv", "v", "k"])
def test_gradients_of_flex(trained):
    gradients = []
    for implementation in ("flex", "eager"):
        arrays = qkv(requires_grad=trained)
        attended(implementation, *arrays, window=5).square().sum().backward()
        gradients.append([array.grad for array in arrays if array.requires_grad])
    assert len(gradients[0]) == len(trained)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@flex_feature
def test_flex_leaves_no_warnings_and_no_warning_filters():
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        make(attn_implementation="flex")(IDS)
    assert not caught
    assert warnings.filters == before


# FlashAttention 2


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False, window_size=(-1, -1)
):
    """What the package's function of this name computes, as its documentation says."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q.diff() <= max_seqlen_q).all()
    assert (cu_seqlens_k.diff() <= max_seqlen_k).all()
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(int(c[row]), int(c[row + 1])) for c in (cu_seqlens_q, cu_seqlens_k))
        q_TNH, k_SNH, v_SNH = q[queries], *(x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        T, S = len(q_TNH), len(k_SNH)
        distance = torch.arange(T)[:, None] + S - T - torch.arange(S)  # the last query sees the last key
        left, right = window_size
        hidden = (distance < 0) & causal | (distance > left) & (left >= 0) | (-distance > right) & (right >= 0)
        scores = torch.einsum("tnh,snh->nts", q_TNH.float(), k_SNH.float()) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0).to(v.dtype)
        outputs.append(torch.einsum("nts,snh->tnh", F.dropout(weights, dropout_p), v_SNH))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch):
    """The package flash-attn, as far as we call it."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@flash_feature
@WINDOWS
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_is_the_formula(flash, window, documents, dtype):
    out, eager = (
        attended(name, *qkv(dtype), window=window, documents=documents) for name in ("flash_attention_2", "eager")
    )
    assert out.dtype == dtype
    assert torch.allclose(out, eager, atol=4 * torch.finfo(dtype).eps)
    assert (out[MASK == 0] == 0).all()


@flash_feature
@pytest.mark.parametrize("options", [{}, {"capacity": 17}, {"capacity": 17, "rolling": False}])
def test_flash_with_a_cache(flash, options):
    ours, eager = (make(attn_implementation=name).bfloat16() for name in ("flash_attention_2", "eager"))
    for lengths in ([7, 1, 9], [1] * 17, [3, 14]):
        difference = real(in_chunks(ours, lengths, **options)) - real(eager(IDS, MASK).logits)
        assert difference.abs().max() < 16 * torch.finfo(torch.bfloat16).eps


@flash_feature
def test_flash_trains_with_dropout(flash):
    model = make(TINY.replace(attention_dropout=0.2), attn_implementation="flash_attention_2").train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(IDS, MASK, labels=IDS).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@flash_feature
def test_flash_refuses_what_it_cannot_do(flash):
    with pytest.raises(UnsupportedFeatureError, match="float32.*bfloat16.*sdpa"):
        make(attn_implementation="flash_attention_2")(IDS)
    with pytest.raises(UnsupportedFeatureError, match="document_ids.*sdpa"):
        attended("flash_attention_2", *qkv(torch.float16), documents=torch.arange(17).expand(3, 17) % 2)
    assert "flash_attention_2" in attention.available()


@flash_feature
def test_without_the_package_flash_says_what_to_install(tmp_path):
    assert attention.available() == ("eager", "sdpa", "blocked", "flex")
    with pytest.raises(MissingExtraError, match="pip install flash-attn.*sdpa"):
        make(attn_implementation="flash_attention_2")
    make().save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="flash-attn"):
        MistralForCausalLM.from_pretrained(tmp_path, use_flash_attention_2=True)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(UnsupportedFeatureError, match="must be one of eager, sdpa, blocked, flex.*, got 'splash'"):
        make(attn_implementation="splash")


# Dropout


@pytest.mark.feature("Attention dropout in training")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "blocked", "flex"])
def test_dropout_in_training_only(implementation):
    model = make(TINY.replace(attention_dropout=0.5), attn_implementation=implementation)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.allclose(model(IDS).logits, make(attn_implementation=implementation)(IDS).logits, atol=1e-5)
    model.train()
    torch.manual_seed(3)
    once, twice = model(IDS, labels=IDS), model(IDS, labels=IDS)
    assert not torch.equal(once.logits, twice.logits)
    torch.manual_seed(3)
    assert torch.equal(model(IDS, labels=IDS).logits, once.logits)
    once.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.feature("Attention dropout in training")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex", "flash_attention_2"])
def test_dropout_keeps_the_mean_and_has_its_variance(flash, implementation):
    torch.manual_seed(0)
    arrays = qkv(torch.float16 if implementation == "flash_attention_2" else torch.float32)
    many = torch.stack([attended(implementation, *arrays, window=5, dropout=0.3) for _ in range(400)]).float()
    kept, weights = attend(*qkv(), Visibility(order_of(MASK), order_of(MASK), window=5))
    expected = 0.3 / 0.7 * torch.einsum("bnts,bsnh->btnh", weights.square(), qkv()[2].repeat_interleave(3, 2).square())
    assert (many.mean(0) * kept).sum() / kept.square().sum() == pytest.approx(1, abs=0.01)
    assert many.var(0).sum() / expected.sum() == pytest.approx(1, abs=0.05)


# What is not read


def test_slots_that_hold_nothing_are_not_looked_at():
    """On a CPU a prompt in pieces sees the slots that are used so far, and not all that the cache has room for."""
    order_BT, length_B = torch.tensor([[4, 5], [-1, 2]]), torch.tensor([4, 2])
    found = place(order_BT, length_B, 41, window=None, capacity=40)
    assert found.order_BS.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]]
    k_BTKH = torch.ones(2, 2, 1, 4)
    past = torch.zeros(2, 41, 1, 4), torch.zeros(2, 41, 1, 4), length_B
    seen, _, kept = remember(k_BTKH, k_BTKH, past, found)
    assert seen.shape[1] == 6
    assert kept[0].shape[1] == 41
    rolled = place(torch.tensor([[9, 10]]), torch.tensor([9]), 8, window=3, capacity=40)
    assert rolled.order_BS.shape[1] == 8, "a ring that has rolled on is full"


def test_the_head_of_a_bfloat16_model_makes_no_float32_copy(monkeypatch):
    """Few rows read the matrix as it is, with the same numbers; rows to learn from, or many, do not."""
    if not native.available():
        pytest.skip(native.why())
    calls = []
    inner = native.widened_product
    monkeypatch.setattr(native, "widened_product", lambda *each: calls.append(1) or inner(*each))
    torch.manual_seed(0)
    weight, bias = torch.randn(37, 40).bfloat16(), torch.randn(37).bfloat16()
    for rows, given in ((1, None), (3, bias), (16, None)):
        x = torch.randn(2 if rows == 3 else 1, rows, 40).bfloat16()
        expected = x.double() @ weight.double().T + (0 if given is None else given.double())
        found = product(x, weight, given, dtype=torch.float32)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=1e-5)
    assert len(calls) == 3
    product(torch.randn(17, 40).bfloat16(), weight, dtype=torch.float32)
    product(torch.randn(1, 40).bfloat16(), weight)
    product(torch.randn(1, 40).requires_grad_(), weight, dtype=torch.float32).sum().backward()
    torch.func.vmap(lambda x: product(x, weight, dtype=torch.float32))(torch.randn(2, 3, 40))
    assert len(calls) == 3
