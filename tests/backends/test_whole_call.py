"""A text through all layers in one call of C: what torch's operations give, and nothing that somebody watches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_whole_prompt import CONFIGS, STEPS_OF_ROUNDING, WHOLE, ragged, tiles  # noqa: F401
from test_whole_step import EPS
from torch.utils.flop_counter import FlopCounterMode

import mistral_torch
from conformance.weights import random_parameters
from mistral_core.errors import InputError
from mistral_core.native import whole_step
from mistral_torch import KVCache

IDS = torch.arange(100)[None] % 90


@pytest.fixture
def texts(tiles, monkeypatch):  # noqa: F811
    """The shapes of texts that C computes from now on, in chunks of some tokens."""
    seen, of_c = [], whole_step.WholeStep.layers

    def layers(self, x_BTD, *others):
        seen.append(x_BTD.shape[:2])
        return of_c(self, x_BTD, *others)

    monkeypatch.setattr(whole_step.WholeStep, "layers", layers)
    for chunk in ("CHUNK", "LARGE_CHUNK"):
        monkeypatch.setattr(whole_step, chunk, 48)
    return seen


def model_of(config, dtype, architecture="MistralForCausalLM"):
    arrays = random_parameters(config, architecture)
    model = getattr(mistral_torch, architecture)(config).load_arrays(arrays)
    return model.to(getattr(torch, dtype)).eval()


def in_c_and_in_torch(texts, call):
    """The same call twice, without gradients and, by torch's own operations, with them."""
    with torch.no_grad():
        found = call()
    assert len(texts) == 1
    with torch.enable_grad():
        wanted = call()
    assert len(texts) == 1
    return found, wanted


def assert_near(found, wanted, dtype):
    found, wanted = found.float(), wanted.detach().float()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= STEPS_OF_ROUNDING[dtype] * EPS[dtype] * wanted.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 300), (3, 131), (7, 20), (40, 2)])
def test_states_losses_and_caches_are_torch_s(tiles, texts, name, rows, columns):  # noqa: F811
    """A row in several chunks, and a chunk of several rows."""
    model, given = model_of(CONFIGS[name], tiles), ragged(rows, columns)
    real = torch.from_numpy(given["attention_mask"]) != 0
    labels = torch.from_numpy(given["input_ids"]).masked_fill(~real, -100)
    found, wanted = in_c_and_in_torch(texts, lambda: model(**given, labels=labels))
    assert texts == [(rows, columns)]
    assert_near(found.logits[real], wanted.logits[real], tiles)
    assert_near(found.loss, wanted.loss, tiles)
    assert torch.equal(found.past_key_values.length, real.sum(1))
    kept_alike(found.past_key_values, wanted.past_key_values, model.config.layer_windows, tiles)


@pytest.mark.parametrize("name", ["all keys", "mixed"])
def test_without_a_cache_layers_share_a_ring(tiles, texts, name):  # noqa: F811
    model = model_of(CONFIGS[name], tiles)
    found, wanted = in_c_and_in_torch(texts, lambda: model(**ragged(2, 150), use_cache=False))
    assert found.past_key_values is None
    real = torch.from_numpy(ragged(2, 150)["attention_mask"]) != 0
    assert_near(found.logits[real], wanted.logits[real], tiles)


@pytest.mark.parametrize("name", ["all keys", "window", "mixed"])
def test_packed_documents_see_themselves(tiles, texts, name):  # noqa: F811
    """Of any length, one of which a window does not fill, and beside padding."""
    model, given = model_of(CONFIGS[name], tiles), ragged(2, 150)
    real = torch.from_numpy(given["attention_mask"]) != 0
    given["document_ids"] = np.searchsorted([1, 12, 60, 61, 140], np.arange(150), side="right")[None].repeat(2, axis=0)
    given["document_ids"][1] = 1 - given["document_ids"][1]
    found, wanted = in_c_and_in_torch(texts, lambda: model(**given).logits)
    assert_near(found[real], wanted[real], tiles)
    texts.clear()
    again = {"input_ids": given["input_ids"], "position_ids": torch.arange(150)[None] % 70}
    found, wanted = in_c_and_in_torch(texts, lambda: model(**again).logits)
    assert_near(found, wanted, tiles)


def kept_alike(found, wanted, windows, dtype):
    """Caches hold the same where a later token sees it."""
    assert torch.equal(found.length, wanted.length)
    for layer, window in enumerate(windows):
        for of_c, of_torch in ((found.keys, wanted.keys), (found.values, wanted.values)):
            assert of_c[layer].shape == of_torch[layer].shape
            for row, length in enumerate(found.length.tolist()):
                seen = torch.arange(max(length - (window or length), 0), length) % of_c[layer].shape[1]
                assert_near(of_c[layer][row, seen], of_torch[layer][row, seen], dtype)


@pytest.mark.parametrize("name", ["all keys", "window", "mixed"])
@pytest.mark.parametrize("cuts", [(70,), (10, 80), (100, 164), (80, 145)])
def test_a_text_goes_on_after_its_cache(tiles, texts, name, cuts):  # noqa: F811
    """In C and in torch in turn: rings that grow, that are full, and that a piece of a text turns over."""
    model, given = model_of(CONFIGS[name], tiles), ragged(2, 230)
    real = torch.from_numpy(given["attention_mask"]) != 0
    pieces = [slice(*each) for each in itertools.pairwise((0, *cuts, 230))]

    def run():
        past, logits = None, []
        for piece in pieces:
            some = {name: array[:, piece] for name, array in given.items()}
            output = model(**some, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits.append(output.logits)
        return torch.cat(logits, 1), past

    with torch.no_grad():
        found, after = run()
    assert texts == [(2, each.stop - each.start) for each in pieces if each.stop - each.start > 31]
    with torch.enable_grad():
        wanted, expected = run()
    assert_near(found[real], wanted[real], tiles)
    kept_alike(after, expected, model.config.layer_windows, tiles)


@torch.no_grad()
def test_a_cache_that_is_laid_out_otherwise_is_continued(tiles, texts):  # noqa: F811
    model, ids = model_of(CONFIGS["mixed"], tiles), ragged(2, 200)["input_ids"]
    past = model(ids[:, :100]).past_key_values
    turned = past._replace(
        keys=tuple(x.mT.contiguous().mT for x in past.keys), values=tuple(x.mT.contiguous().mT for x in past.values)
    )
    assert not turned.keys[0].is_contiguous()
    wanted = model(ids[:, 100:], past_key_values=past.select_rows(torch.arange(2)))
    found = model(ids[:, 100:], past_key_values=turned)
    assert len(texts) == 3
    assert torch.equal(found.logits, wanted.logits)


@torch.no_grad()
def test_a_cache_of_other_rows_or_heads_is_torch_s_to_refuse(tiles, texts):  # noqa: F811
    model = model_of(WHOLE, tiles)
    past = model(IDS.expand(2, -1)).past_key_values
    texts.clear()
    wrong = {
        "rows": past.select_rows(torch.tensor([0, 1, 1])),
        "heads": past._replace(keys=tuple(x[:, :, :1] for x in past.keys)),
        "head size": past._replace(values=tuple(x[..., :16] for x in past.values)),
    }
    for each in wrong.values():
        with pytest.raises((RuntimeError, IndexError, InputError)):
            model(IDS.expand(2, -1), past_key_values=each)
    model(IDS.expand(2, -1), past_key_values=past._replace(values=tuple(x[:, :50] for x in past.values)))
    assert not texts


@pytest.mark.parametrize("past", [False, True])
def test_hidden_states_are_those_of_each_layer(tiles, texts, past):  # noqa: F811
    model, given = model_of(WHOLE.replace(num_hidden_layers=3), tiles), ragged(3, 131)
    real = torch.from_numpy(given["attention_mask"]) != 0

    def run():
        first = model(**ragged(3, 90)).past_key_values if past else None
        return model(**given, past_key_values=first, output_hidden_states=True).hidden_states

    with torch.no_grad():
        found = run()
    assert len(texts) == 1 + past
    with torch.enable_grad():
        wanted = run()
    assert len(found) == len(wanted) == 4
    for ours, theirs in zip(found, wanted, strict=True):
        assert_near(ours[real], theirs[real], tiles)


def test_of_other_positions_and_of_embeddings(tiles, texts):  # noqa: F811
    model = model_of(WHOLE, tiles)
    positions = 3 * torch.arange(100)[None]
    found, wanted = in_c_and_in_torch(texts, lambda: model(IDS.expand(2, -1), position_ids=positions).logits)
    assert_near(found, wanted, tiles)
    texts.clear()
    embeds = torch.randn(2, 100, WHOLE.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    before = embeds.clone()
    found, wanted = in_c_and_in_torch(texts, lambda: model(inputs_embeds=embeds).logits)
    assert_near(found, wanted, tiles)
    assert torch.equal(embeds, before), "what is given stays as it is"


@pytest.mark.parametrize("architecture", ["MistralModel", "MistralForSequenceClassification"])
def test_every_model_s_body(tiles, texts, architecture):  # noqa: F811
    model = model_of(WHOLE, tiles, architecture)
    found, wanted = in_c_and_in_torch(texts, lambda: model(**ragged(2, 70))[0])
    if architecture == "MistralModel":
        real = torch.from_numpy(ragged(2, 70)["attention_mask"]) != 0
        found, wanted = found[real], wanted[real]
    assert_near(found, wanted, tiles)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_of_packed_weights(tiles, texts, scheme):  # noqa: F811
    model = mistral_torch.quantize(model_of(WHOLE, tiles), scheme)
    found, wanted = in_c_and_in_torch(texts, lambda: model(IDS).logits)
    assert_near(found, wanted, tiles)


@torch.no_grad()
def test_weights_are_those_of_the_call(tiles, texts):  # noqa: F811
    """Norms are copied for C: a later call sees what they are then."""
    model = model_of(WHOLE, tiles)
    before = model(IDS).logits
    for name, parameter in model.named_parameters():
        parameter.data.mul_(1.25 if name.endswith("norm.weight") else 1)
    after = model(IDS).logits
    assert len(texts) == 2
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    with torch.enable_grad():
        assert_near(after, model(IDS).logits, tiles)


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model):
    model.model.layers[1].mlp.forward = type(model.model.layers[1].mlp).forward.__get__(model.model.layers[1].mlp)


def shortened(model):
    model.model.layers = model.model.layers[:1]


def narrowed(model):
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        part = getattr(model.model.layers[1].mlp, name)
        part.weight = torch.nn.Parameter(part.weight.narrow(axis, 0, 96).contiguous())


DONE_BEFORE = {"a hook": hooked, "another forward": replaced, "fewer layers": shortened, "a narrower MLP": narrowed}
ASKED = {
    "attentions": {"output_attentions": True},
    "a document that goes on after another one": {"document_ids": torch.arange(100)[None] // 10 % 3},
    "a cache with a capacity": {"past_key_values": "capacity"},
    "a cache of another dtype": {"past_key_values": "int8"},
    "few tokens": {"input_ids": IDS[:, :63]},
    "a token of each row": {"input_ids": IDS.mT},
}


@pytest.mark.parametrize("what", DONE_BEFORE)
@torch.no_grad()
def test_what_was_done_to_a_model_is_seen(tiles, texts, what):  # noqa: F811
    model = model_of(WHOLE, tiles)
    DONE_BEFORE[what](model)
    assert torch.isfinite(model(IDS, use_cache=False).logits).all()
    assert not texts


@torch.no_grad()
def test_what_was_put_into_a_class_is_called(tiles, texts, monkeypatch):  # noqa: F811
    model = model_of(WHOLE, tiles)
    kind, before = type(model.model.layers[1].mlp), model(IDS, use_cache=False).logits
    assert texts
    texts.clear()
    monkeypatch.setattr(kind, "forward", lambda self, x: torch.zeros_like(x))
    assert (model(IDS, use_cache=False).logits - before).abs().max() > 0.01 * before.abs().max()
    assert not texts


@pytest.mark.parametrize("what", ASKED)
@torch.no_grad()
def test_what_else_is_asked_for_is_torch_s(tiles, texts, what):  # noqa: F811
    model, given = model_of(WHOLE, tiles), {"input_ids": IDS, **ASKED[what]}
    caches = {
        "capacity": KVCache.allocate(WHOLE, 1, 100, dtype=model.dtype),
        "int8": KVCache.allocate(WHOLE, 1, dtype="int8"),
    }
    if "past_key_values" in given:
        given["past_key_values"] = caches[given["past_key_values"]]
    model(**given)
    assert not texts
    model(IDS)
    assert texts, "without it it is C's"


@torch.no_grad()
def test_models_that_compute_otherwise_are_torch_s(tiles, texts):  # noqa: F811
    model_of(WHOLE, "float16")(IDS)
    model_of(WHOLE.replace(hidden_size=144, head_dim=64), tiles)(IDS)
    arrays = random_parameters(WHOLE, "MistralForCausalLM")
    for implementation in ("eager", "blocked"):
        other = mistral_torch.MistralForCausalLM(WHOLE, attn_implementation=implementation).load_arrays(arrays)
        other.to(getattr(torch, tiles)).eval()(IDS)
    model_of(WHOLE.replace(attention_dropout=0.5), tiles).train()(IDS)
    model = model_of(WHOLE, tiles)
    with torch.autocast("cpu", dtype=torch.float16):
        model(IDS)
    with FlopCounterMode(display=False) as counted:
        model(IDS)
    assert counted.get_total_flops() > 0
    assert not texts
    model_of(WHOLE.replace(attention_dropout=0.5), tiles)(IDS)
    assert texts, "nothing is dropped where nothing trains"


def test_many_rows_are_multiplied_as_a_prompt_s_are(tiles, texts, monkeypatch):  # noqa: F811
    """Chunks of 256 rows and more, which are MKL's where a prompt's are."""
    for chunk in ("CHUNK", "LARGE_CHUNK"):
        monkeypatch.setattr(whole_step, chunk, 512)
    model, ids = model_of(WHOLE, tiles), np.random.default_rng(0).integers(3, 90, (2, 700))
    found, wanted = in_c_and_in_torch(texts, lambda: model(ids).logits)
    assert_near(found, wanted, tiles)
