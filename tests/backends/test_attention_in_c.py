"""Attention in C, beside the formula: whoever sees whom, and only where nobody misses what torch would do."""

from __future__ import annotations

import pytest
import torch
from test_whole_prompt import CONFIGS, WHOLE, tiles  # noqa: F401
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import mistral_torch
from conformance.weights import random_parameters
from mistral_core.native import attention as in_c
from mistral_torch import attention, attention_in_c
from mistral_torch.attention import Visibility

T, H = 100, 32
EPS = {"float32": 2**-23, "bfloat16": 2**-7}
STEPS = {"float32": 2, "bfloat16": 1}
"""The most that an output may differ, in eps of the largest value: 1.02 and 0.45 were seen on an Intel Xeon."""
STEPS_OF_A_MODEL = {"float32": 24, "bfloat16": 4}
"""The same of logits: 11.4 and 2.0 were seen."""
STEPS_OF_GRADIENTS = {"float32": 24, "bfloat16": 1.4}
"""The same of gradients, which sum over many: 11.3 and 0.67 were seen."""
STEPS_OF_THEIRS = {"float32": 8, "bfloat16": 1}
"""The same of gradients of gradients, and of several at once: 3.7 and 0.47 were seen."""
STEPS_OF_LEARNING = {"float32": 36, "bfloat16": 5}
"""The same of gradients of a model: 17.5 and 2.3 were seen."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture
def calls(tiles, monkeypatch):  # noqa: F811
    """How many queries and keys each call of C has from now on, and whether they were all there."""
    seen, of_c = [], in_c.attend

    def attend(type, sizes, *others, **options):
        seen.append((*sizes[1:3], of_c(type, sizes, *others, **options)))
        return seen[-1][-1]

    monkeypatch.setattr(in_c, "attend", attend)
    return seen


def ordered(mask, past=0):
    return torch.where(mask, past + mask.cumsum(1) - 1, -1)


@pytest.fixture
def learnt(tiles, monkeypatch):  # noqa: F811
    """How many queries and keys each call of C for gradients has from now on."""
    seen, of_c = [], in_c.gradients

    def gradients(type, sizes, *others, **options):
        seen.append(sizes[1:3])
        of_c(type, sizes, *others, **options)

    monkeypatch.setattr(in_c, "gradients", gradients)
    return seen


def plain(past=0):
    """A text after so many keys."""
    query = torch.arange(past, past + T).expand(2, -1)
    return query, torch.arange(past + T).expand(2, -1)


def padded():
    """A row of padding in front and between, one of padding behind, and one of nothing else."""
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[0, :30] = mask[0, 50:53] = mask[1, 70:] = mask[2] = False
    return ordered(mask), ordered(mask)


def rolled():
    """A ring of 64 keys that holds the newest in the slots of their orders, and beside it the new tokens."""
    slots, length = 64, torch.tensor([150, 10])
    newest = length[:, None] - 1
    kept = (newest - (newest - torch.arange(slots)) % slots).clamp(min=-1)
    query = length[:, None] + torch.arange(T)
    return query, torch.cat([kept, query], 1)


SIGHTS = {"alone": plain(), "after some keys": plain(70), "padded": padded(), "beside a ring": rolled()}


def arrays(orders, heads, dtype, seed=0):
    """Queries, keys and values, of which the keys are a slice of what there is."""
    generator = torch.Generator().manual_seed(seed)
    N, K = heads
    (B, queries), S = orders[0].shape, orders[1].shape[1]
    shapes = (B, queries, N, H), (B, S + 3, K, H), (B, S + 3, K, H)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in shapes)
    return q, k[:, :S], v[:, 3:]


def attended(given, *who, in_c=True, implementation="sdpa", dropout=0.0):
    visibility = attention.prepared(Visibility(*who, in_c=in_c), implementation)
    return attention.attend(*given, visibility, implementation=implementation, dropout=dropout)[0]


def assert_near(found, wanted, given, dtype):
    assert found.dtype == getattr(torch, dtype)
    assert found.shape == wanted.shape
    bound = STEPS[dtype] * EPS[dtype] * given[2].double().abs().max()
    assert (found.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("heads", [(6, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 33, 64, 1000])
@pytest.mark.parametrize("name", SIGHTS)
def test_it_is_the_formula(tiles, calls, name, window, heads):  # noqa: F811
    if name == "beside a ring" and (window is None or window > 64):
        window = 65  # a query sees what the ring holds, and itself
    given = arrays(SIGHTS[name], heads, tiles)
    found = attended(given, *SIGHTS[name], window)
    assert calls == [(T, SIGHTS[name][1].shape[1], True)]
    wanted = attended([x.double() for x in given], *SIGHTS[name], window, implementation="eager")
    assert_near(found, wanted, given, tiles)
    assert (found[SIGHTS[name][0] < 0] == 0).all()


DOCUMENTS = {
    "in order": torch.searchsorted(torch.tensor([1, 41, 44, 100]), torch.arange(T), right=True),
    "some again": torch.arange(T) // 9 % 4 - 1,
    "each alone": -torch.arange(T),
}


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed_documents_see_themselves(tiles, calls, window, name):  # noqa: F811
    order, _ = padded()
    documents = DOCUMENTS[name].expand(3, -1).clone()
    documents[1] = documents[1].flip(0)
    given = arrays((order, order), (6, 2), tiles)
    found = attended(given, order, order, window, documents)
    assert len(calls) == 1
    wanted = attended([x.double() for x in given], order, order, window, documents, implementation="eager")
    assert_near(found, wanted, given, tiles)


def gradients(given, upstream, *who, **options):
    """Those of queries, keys and values."""
    return torch.autograd.grad(attended(given, *who, **options), given, upstream)


def learning(orders, heads, dtype):
    """Arrays that learn, the same in float64, and what comes from above."""
    given = [x.requires_grad_() for x in arrays(orders, heads, dtype)]
    return given, [x.detach().double().requires_grad_() for x in given], arrays(orders, heads, dtype, seed=1)[0]


def single():
    """Rows of one token among padding."""
    order = torch.full((2, T), -1)
    order[0, 0] = order[1, 70] = 0
    return order, order


SIGHTS_OF_GRADIENTS = SIGHTS | {"after many keys": plain(500), "single": single()}


@pytest.mark.parametrize("heads", [(6, 2), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("window", "packed"), [(None, None), (1, None), (33, None), (40, "in order"), (40, "some again")], ids=str
)
@pytest.mark.parametrize("name", SIGHTS_OF_GRADIENTS)
def test_its_gradients_are_the_formula_s(tiles, calls, learnt, name, window, packed, heads):  # noqa: F811
    who = SIGHTS_OF_GRADIENTS[name]
    if name == "beside a ring" and window is None:
        window = 65
    if packed and who[0].shape != who[1].shape:
        packed = None
    documents = DOCUMENTS[packed].repeat(len(who[0]), 1) + 2**40 if packed else None
    if packed:
        documents[1] = documents[1].flip(0)
    given, wide, upstream = learning(who, heads, tiles)
    found = gradients(given, upstream, *who, window, documents)
    assert calls == [(T, who[1].shape[1], True)]
    assert learnt == [(T, who[1].shape[1])]
    wanted = gradients(wide, upstream.double(), *who, window, documents, implementation="eager")
    most = max(x.abs().max() for x in wanted)  # a query of one key has no gradient but of rounding
    for ours, theirs, of, order in zip(found, wanted, given, [who[0], who[1], who[1]], strict=True):
        assert ours.dtype == of.dtype
        assert (ours.double() - theirs).abs().max() <= STEPS_OF_GRADIENTS[tiles] * EPS[tiles] * most
        assert (ours[order < 0] == 0).all(), "of what nobody sees, and who sees nothing"


def test_gradients_are_the_same_bits_whatever_the_threads(tiles, learnt):  # noqa: F811
    given, _, upstream = learning(SIGHTS["padded"], (6, 2), tiles)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(given, upstream, *SIGHTS["padded"], 40))
    finally:
        torch.set_num_threads(before)
    assert len(learnt) == 3
    assert all(torch.equal(ours, first) for each in found for ours, first in zip(each, found[0], strict=True))


@pytest.mark.parametrize("long", [False, True])
def test_gradients_of_gradients_are_the_formula_s(tiles, learnt, monkeypatch, long):  # noqa: F811
    if long:
        monkeypatch.setattr("mistral_torch.blocks.COLUMNS", 64)
    who = SIGHTS["padded"]
    given, wide, upstream = learning(who, (6, 2), tiles)

    def twice(given, upstream, **options):
        once = torch.autograd.grad(attended(given, *who, 40, **options), given, upstream, create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in once), given)

    wanted = twice(wide, upstream.double(), implementation="eager")
    for ours, theirs in zip(twice(given, upstream), wanted, strict=True):
        bound = STEPS_OF_THEIRS[tiles] * EPS[tiles] * theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= bound
    assert not learnt


def test_queries_alone_may_learn(tiles, learnt):  # noqa: F811
    (q, *others), _, upstream = learning(SIGHTS["padded"], (6, 2), tiles)
    given = [q, *(x.detach() for x in others)]
    o = attended(given, *SIGHTS["padded"], 40)
    (once,) = torch.autograd.grad(o, q, upstream, retain_graph=True)
    assert len(learnt) == 1
    (again,) = torch.autograd.grad(o, q, upstream, create_graph=True)
    assert (again - once).abs().max() <= STEPS_OF_GRADIENTS[tiles] * EPS[tiles] * once.abs().max()
    assert torch.autograd.grad(again.sum(), q)[0].abs().max() > 0


def test_gradients_of_several_losses_at_once_are_torch_s(tiles, learnt):  # noqa: F811
    given, _, upstream = learning(SIGHTS["padded"], (6, 2), tiles)
    wanted = gradients(given, upstream, *SIGHTS["padded"], 40)
    o = attended(given, *SIGHTS["padded"], 40)
    both = torch.autograd.grad(o, given, torch.stack([upstream, -upstream]), is_grads_batched=True)
    assert len(learnt) == 1
    for ours, theirs in zip(both, wanted, strict=True):
        bound = 2 * STEPS_OF_THEIRS[tiles] * EPS[tiles] * theirs.abs().max()
        assert (ours[0] - theirs).abs().max() <= bound
        assert (ours[1] + theirs).abs().max() <= bound


def test_what_it_is_not_asked_for(tiles, calls):  # noqa: F811
    """Where C does not compute it torch does, whatever was prepared for C."""
    who = SIGHTS["padded"]
    given = arrays(who, (6, 2), tiles)
    wanted = attended(given, *who, 40, in_c=False)
    short = [x[:, :63] for x in who], [x[:, :63] for x in given]
    attended(short[1], *short[0], 40)
    for implementation in ("eager", "blocked"):
        assert_near(attended(given, *who, 40, implementation=implementation), wanted.double(), given, tiles)
    for again in ([x.half() for x in given], [x[..., :24] for x in given]):
        assert attended(again, *who, 40).dtype == again[0].dtype
    with pytest.raises(RuntimeError, match="dtype"):
        attended([given[0], *(x.half() for x in given[1:])], *who, 40)
    assert (attended(given, *who, 40, dropout=0.5) != wanted).any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended(given, *who, 40)
    assert not calls
    assert_near(attended(given, *who, 40), wanted.double(), given, tiles)
    assert calls


@pytest.mark.parametrize("instead", [-1, 61])
def test_a_key_that_is_not_there_is_torch_s(tiles, calls, instead):  # noqa: F811
    query, keys = SIGHTS["after some keys"]
    keys = torch.where(keys == 60, instead, keys)
    given = arrays((query, keys), (6, 2), tiles)
    found = attended(given, query, keys, 40)
    assert calls == [(T, 170, False)]
    assert torch.equal(found, attended(given, query, keys, 40, in_c=False))
    q = given[0].clone().requires_grad_()
    learns = attended([q, *given[1:]], query, keys, 40)
    assert calls == [(T, 170, False)] * 2
    assert torch.equal(learns, found)
    assert torch.autograd.grad(learns.sum(), q)[0].abs().max() > 0
    given = arrays((query, keys[:, :90]), (6, 2), tiles)  # fewer keys than a row sees
    assert torch.isfinite(attended(given, query, keys[:, :90], None).float()).all()
    assert calls[2:] == [(T, 90, False)]


@pytest.mark.parametrize("watched", ["dual", "jvp", "vmap", "make_fx", "trace", "compile"])
@torch.no_grad()
def test_who_watches_sees_torch_s_operations(tiles, calls, watched):  # noqa: F811
    who = SIGHTS["padded"]
    visibility = attention.prepared(Visibility(*who, 40, in_c=True), "sdpa")
    assert visibility.told is not None
    q, k, v = arrays(who, (6, 2), tiles)
    tangent, plainly = torch.ones_like(q), sdpa_kernel(SDPBackend.MATH)

    def function(q):
        return attention.attend(q, k, v, visibility, implementation="sdpa")[0]

    if watched == "dual":
        with forward_ad.dual_level(), plainly:
            assert forward_ad.unpack_dual(function(forward_ad.make_dual(q, tangent))).tangent is not None
    elif watched == "jvp":
        with plainly:
            assert torch.func.jvp(function, (q,), (tangent,))[1].abs().max() > 0
    elif watched == "vmap":
        with plainly:
            assert torch.func.vmap(function)(q[None]).shape == (1, *q.shape)
    elif watched == "make_fx":
        assert_near(make_fx(function)(q)(2 * q), function(2 * q).double(), (q, k, v), tiles)
        calls.clear()
    elif watched == "trace":
        traced = torch.jit.trace(function, (q,), check_trace=False)
        assert not calls
        assert_near(traced(2 * q), function(2 * q).double(), (q, k, v), tiles)
        calls.clear()
    else:
        compiled = torch.compile(function, backend="eager")(q)
        assert not calls
        assert_near(compiled, function(q).double(), (q, k, v), tiles)
        calls.clear()
    assert not calls


@pytest.mark.parametrize("name", ["all keys", "window", "mixed"])
@torch.no_grad()
def test_a_model_s_layers_one_by_one(tiles, calls, monkeypatch, name):  # noqa: F811
    """Where a hook keeps a model from being one call of C, a text that goes on after a cache with a capacity."""
    config = CONFIGS[name]
    model = mistral_torch.MistralForCausalLM(config)
    model.load_arrays(random_parameters(config, "MistralForCausalLM")).to(getattr(torch, tiles)).eval()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    ids = torch.arange(300).reshape(2, 150) % 90
    mask = torch.ones_like(ids)
    mask[1, :40] = 0

    def logits():
        past = mistral_torch.KVCache.allocate(config, 2, 150, dtype=model.dtype)
        first = model(ids[:, :70], attention_mask=mask[:, :70], past_key_values=past)
        rest = model(ids[:, 70:], attention_mask=mask[:, 70:], past_key_values=first.past_key_values)
        return torch.cat([first.logits, rest.logits], 1)[mask != 0].float()

    found = logits()
    assert len(calls) == 2 * config.num_hidden_layers
    monkeypatch.setattr(attention_in_c, "LEAST", 1000)
    wanted = logits()
    assert len(calls) == 2 * config.num_hidden_layers
    assert (found - wanted).abs().max() <= STEPS_OF_A_MODEL[tiles] * EPS[tiles] * wanted.abs().max()


@pytest.mark.parametrize("how", ["padded", "packed", "checkpointed", "after a cache"])
def test_a_model_learns_the_same(tiles, calls, learnt, monkeypatch, how):  # noqa: F811
    config = CONFIGS["mixed"]
    model = mistral_torch.MistralForCausalLM(config)
    model.load_arrays(random_parameters(config, "MistralForCausalLM")).to(getattr(torch, tiles)).train()
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    ids = torch.arange(300).reshape(2, 150) % 90
    mask = torch.ones_like(ids)
    mask[1, :40] = 0

    def both():
        if how == "packed":
            out = model(ids, document_ids=(torch.arange(150) // 31).expand(2, -1), labels=ids)
        elif how == "after a cache":
            first = model(ids[:, :70], attention_mask=mask[:, :70], use_cache=True)
            past = first.past_key_values
            out = model(ids[:, 70:], attention_mask=mask[:, 70:], past_key_values=past, labels=ids[:, 70:])
        else:
            out = model(ids, attention_mask=mask, labels=torch.where(mask == 0, -100, ids))
        return [out.loss, *torch.autograd.grad(out.loss, list(model.parameters()))]

    found = both()
    layers = config.num_hidden_layers
    assert len(calls) == (2 if how in ("checkpointed", "after a cache") else 1) * layers
    # what the last layer gives of the tokens that are kept is not used
    times = len(learnt)
    assert times == (2 * layers - 1 if how == "after a cache" else layers)
    monkeypatch.setattr(attention_in_c, "LEAST", 1000)
    wanted = both()
    assert len(learnt) == times
    for ours, theirs in zip(found, wanted, strict=True):
        bound = STEPS_OF_LEARNING[tiles] * EPS[tiles] * theirs.float().abs().max()
        assert (ours.float() - theirs.float()).abs().max() <= bound


def test_a_model_that_drops_attention_weights_learns_by_torch(tiles, calls):  # noqa: F811
    model = mistral_torch.MistralForCausalLM(CONFIGS["mixed"].replace(attention_dropout=0.5)).train()
    ids = torch.arange(300).reshape(2, 150) % 90
    model(ids, labels=ids).loss.backward()
    assert not calls
    model.eval()(ids, labels=ids).loss.backward()
    assert calls


def test_which_calls_are_for_c(tiles):  # noqa: F811
    x = torch.zeros(2, 32, 8, dtype=getattr(torch, tiles))
    with torch.no_grad():
        assert attention_in_c.may_be_for_c(x, 32)
        assert not attention_in_c.may_be_for_c(x, 24)
        assert not attention_in_c.may_be_for_c(x[:, :31], 32)
        assert not attention_in_c.may_be_for_c(x.reshape(64, 1, 8), 32)
        assert not attention_in_c.may_be_for_c(x.half(), 32)
        assert not attention_in_c.may_be_for_c(x.to("meta"), 32)
    assert attention_in_c.may_be_for_c(x, 32)
