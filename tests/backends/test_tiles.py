"""Long texts by tiles of tokens: the same numbers and gradients, less kept, and nothing that a hook would notice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from mistral_core import MistralConfig
from mistral_torch import MistralForCausalLM, layers, tiles

B, T, D, N, H = 2, 23, 12, 3, 4
CONFIG = MistralConfig(
    vocab_size=31, hidden_size=D, intermediate_size=20, num_hidden_layers=2, num_attention_heads=N,
    num_key_value_heads=1, head_dim=H, sliding_window=9,
)  # fmt: skip
IDS = torch.arange(B * T).reshape(B, T) % 29
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture
def small(monkeypatch):
    """Tiles of few tokens."""

    def set_to(mapped=0, cached=400, least=1):
        for name, value in {"MAPPED": mapped, "CACHED": cached, "LEAST": least}.items():
            monkeypatch.setattr(tiles, name, value)

    return set_to


@pytest.fixture
def computed(monkeypatch):
    """How many tiles each call had, as they are computed, the products' first."""
    found = {"products": [], "others": []}
    run = tiles._computed

    def told(formula, size, given):
        found["products" if "in_tiles" in formula.__qualname__ else "others"].append(len(tiles._tiles(given[0], size)))
        return run(formula, size, given)

    monkeypatch.setattr(tiles, "_computed", told)
    return found


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model():
    torch.manual_seed(0)
    return MistralForCausalLM(CONFIG)


GIVEN = {
    "rms_norm": (layers.rms_norm, (drawn(B, T, D), drawn(D, seed=1), 1e-5)),
    "gated": (layers.gated, (drawn(B, T, D), drawn(B, T, D, seed=1))),
}


def gradients(function, given, learnt, upstream):
    leaves = [x.clone().requires_grad_(n in learnt) if isinstance(x, torch.Tensor) else x for n, x in enumerate(given)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, [leaves[n] for n in learnt], upstream)]


@pytest.mark.parametrize("learnt", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", GIVEN)
def test_gradients_of_tiles_are_the_formula_s(small, computed, name, learnt):
    function, given = GIVEN[name]
    upstream = drawn(*given[0].shape, seed=3)
    expected = gradients(function, given, learnt, upstream)
    small()
    for one, other in zip(gradients(function, given, learnt, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert computed["others"]
    assert computed["others"][0] > 3


@pytest.mark.parametrize("name", GIVEN)
def test_a_gradient_of_a_gradient_goes_through_tiles(small, name):
    function, given = GIVEN[name]
    found = []
    for mapped in (1 << 30, 0):
        small(mapped=mapped)
        x = given[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, *given[1:]).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def kept(function):
    """Bytes that are kept for gradients while a function computes, each array once."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function()
    return sum(each.nbytes() for each in found.values()), y


def test_nothing_but_arguments_is_kept(small):
    for name, (function, given) in GIVEN.items():
        leaf = given[0].clone().requires_grad_()
        arguments = [leaf, *given[1:]]
        whole = kept(lambda function=function, arguments=arguments: function(*arguments))[0]
        small()
        few = kept(lambda function=function, arguments=arguments: function(*arguments))[0]
        small(mapped=1 << 30)
        assert few <= sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor)), name
        assert few <= whole, name


@torch.no_grad()
def test_an_mlp_goes_by_tiles(small, computed):
    net = model().eval()
    expected = net(IDS).logits
    small()
    torch.testing.assert_close(net(IDS).logits, expected, **CLOSE)
    assert computed["products"] == [T] * 2


def test_where_gradients_keep_all_the_mlp_is_whole(small, computed):
    net = model().train()
    small()
    net(IDS, labels=IDS).loss.backward()
    assert not computed["products"]
    assert computed["others"]


@pytest.mark.parametrize("frozen", ["", "embed_tokens", "mlp"])
def test_a_checkpointed_layer_computes_its_mlp_twice_at_most(small, computed, frozen):
    """Its second time ends before the MLP, whose tiles are computed again by themselves."""

    def step(net):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not frozen or frozen not in name)
        net.train().gradient_checkpointing_enable()
        net(IDS, labels=IDS).loss.backward()
        return {name: x.grad for name, x in net.named_parameters()}

    expected = step(model())
    small()
    found = step(model())
    assert computed["products"] == [T] * 2, "as often as there are layers"
    assert {name for name, x in found.items() if x is None} == {name for name, x in expected.items() if x is None}
    for name, x in found.items():
        if x is not None:
            torch.testing.assert_close(x, expected[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


def test_reentrant_checkpointing_computes_the_same_bits_twice(small, computed):
    small()
    net = model().train()
    net.gradient_checkpointing_enable({"use_reentrant": True})
    net(IDS, labels=IDS).loss.backward()
    assert not computed["products"]


def test_a_hook_is_called_once_with_all_tokens(small, computed):
    small()
    net, shapes = model().eval(), []
    net.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, given, y: shapes.append(tuple(y.shape)))
    with torch.no_grad():
        net(IDS)
    assert shapes == [(B, T, CONFIG.intermediate_size)]
    assert computed["products"] == [T], "the other layer's"


@torch.no_grad()
def test_other_products_are_called_as_they_are(small, computed):
    small()
    net = model().eval()
    wrapped = nn.Sequential(net.model.layers[0].mlp.up_proj)
    net.model.layers[0].mlp.up_proj = wrapped
    net.model.layers[1].mlp.down_proj = nn.Linear(CONFIG.intermediate_size, D)
    net(IDS)
    assert not computed["products"]


def test_who_must_see_the_formula_sees_it(small, computed):
    small()
    net, x = model().eval().model.layers[0].mlp, drawn(B, T, D)
    _, expected = torch.func.jvp(net, (x,), (x,))
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(found, expected)
    torch.vmap(net)(torch.stack([x, x]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(x)
    torch.compile(net, backend="eager", fullgraph=True)(x)
    assert computed == {"products": [], "others": []}
