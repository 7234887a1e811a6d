"""Bad inputs of a model call: the same typed error in every backend, before any framework sees them."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import (
    CacheOverflowError,
    EmptyInputError,
    InputError,
    MaskError,
    NonFiniteInputError,
    PositionError,
    SequenceTooLongError,
    TokenIdError,
)

CONFIG = TINY.replace(max_position_embeddings=64)
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
EMBEDS = np.random.default_rng(1).normal(size=(2, 9, CONFIG.hidden_size)).astype(np.float32)


@pytest.fixture(scope="module")
def model(backend):
    model = backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    return model.eval() if backend.__name__ == "mistral_torch" else model


def plain(array):
    return np.asarray(array.detach() if hasattr(array, "detach") else array)


def logits(out):
    return plain(out.logits)


def spoiled(value):
    ids = IDS.copy()
    ids[1, 4] = value
    return ids


@pytest.mark.parametrize(
    ("error", "inputs", "hint"),
    [
        (TokenIdError, {"input_ids": spoiled(CONFIG.vocab_size)}, "0 to 96"),  # 86
        (TokenIdError, {"input_ids": spoiled(2**31 + 5)}, "0 to 96"),
        (TokenIdError, {"input_ids": spoiled(-1)}, r"-1 at \[1, 4\]"),  # 87
        (TokenIdError, {"input_ids": spoiled(-100)}, "labels"),
        (TokenIdError, {"input_ids": IDS.astype(np.float32)}, "integers"),  # 88
        (TokenIdError, {"input_ids": IDS > 5}, "integers"),
        (TokenIdError, {"input_ids": [["a", "b"]]}, "integers"),
        (TokenIdError, {"input_ids": np.array([[2**63 + 1]], np.uint64)}, "int64"),
        (TokenIdError, {"input_ids": [[1, 2], [3]]}, "pad"),  # 89
        (InputError, {"input_ids": IDS[None]}, "shape"),
        (EmptyInputError, {"input_ids": IDS[:0]}, "no token"),
        (EmptyInputError, {"input_ids": IDS[:, :0]}, "no token"),
        (InputError, {}, "either"),  # 90
        (InputError, {"input_ids": IDS, "inputs_embeds": EMBEDS}, "either"),
        (InputError, {"inputs_embeds": EMBEDS[..., :5]}, "48"),
        (NonFiniteInputError, {"inputs_embeds": EMBEDS * np.nan}, "NaN"),
        (MaskError, {"input_ids": IDS, "attention_mask": np.ones((2, 8), int)}, "shape"),  # 91
        (MaskError, {"input_ids": IDS, "attention_mask": np.ones((1, 9), int)}, "shape"),
        (MaskError, {"input_ids": IDS, "attention_mask": np.ones((2, 1, 1, 9), int)}, "shape"),
        (MaskError, {"input_ids": IDS, "attention_mask": np.full((2, 9), 2)}, "additive"),
        (MaskError, {"input_ids": IDS, "attention_mask": np.where(IDS > 50, 0.0, -1e9)}, "additive"),
        (SequenceTooLongError, {"input_ids": np.full((1, 65), 5)}, "64"),  # 94
        (PositionError, {"input_ids": IDS, "position_ids": np.full((2, 9), 64)}, "63"),  # 95
        (PositionError, {"input_ids": IDS, "position_ids": np.full((2, 9), -1)}, "-1"),
        (PositionError, {"input_ids": IDS, "position_ids": np.zeros((2, 8), int)}, "shape"),
        (InputError, {"input_ids": IDS, "logits_to_keep": 10}, "0 .all. to 9"),  # 98
        (InputError, {"input_ids": IDS, "logits_to_keep": -1}, "0 .all. to 9"),
        (InputError, {"input_ids": IDS, "labels": IDS[:, :5]}, "labels"),
        (TokenIdError, {"input_ids": IDS, "labels": spoiled(97)}, "labels"),
        (InputError, {"input_ids": IDS, "document_ids": IDS[:, :5]}, "document_ids"),
    ],
)
def test_bad_inputs(model, error, inputs, hint):
    with pytest.raises(error, match=hint):
        model(**inputs)


@pytest.mark.parametrize("kind", [bool, np.int32, np.int64, np.float32, np.float16])
def test_masks_of_every_dtype_mean_the_same(model, kind):  # bug 19
    mask = np.ones((2, 9), int)
    mask[0, :3] = 0
    assert np.array_equal(logits(model(IDS, mask.astype(kind))), logits(model(IDS, mask)))


def test_lists_arrays_and_one_dimension_mean_the_same(model):
    assert np.array_equal(logits(model(IDS.tolist())), logits(model(IDS)))
    assert np.array_equal(logits(model(IDS[0].tolist())), logits(model(IDS[:1])))
    assert np.array_equal(logits(model(IDS.astype(np.uint8))), logits(model(IDS)))


def test_padding_ids_do_not_reach_real_rows(model):  # bug 18
    mask = np.ones((2, 9), int)
    mask[:, :4] = 0
    other = IDS.copy()
    other[:, :4] = 7
    assert np.array_equal(logits(model(IDS, mask))[:, 4:], logits(model(other, mask))[:, 4:])


def test_a_full_cache_is_an_error_and_unchanged(backend, model):  # 96, bug 13
    cache = backend.KVCache.allocate(CONFIG, 2, 9)
    out = model(IDS[:, :8], past_key_values=cache)
    before = [plain(keys).copy() for keys in out.past_key_values.keys]
    with pytest.raises(CacheOverflowError, match="room for 9"):
        model(IDS[:, :2], past_key_values=out.past_key_values)
    for old, new in zip(before, out.past_key_values.keys, strict=True):
        assert np.array_equal(old, plain(new))
    model(IDS[:, 8:], past_key_values=out.past_key_values)


def test_a_cache_of_another_batch_or_model_is_an_error(backend, model):
    with pytest.raises(InputError, match="another model or batch"):
        model(IDS, past_key_values=backend.KVCache.allocate(CONFIG, 3, 20))
    other = CONFIG.replace(num_hidden_layers=2)
    with pytest.raises(InputError, match="another model or batch"):
        model(IDS, past_key_values=backend.KVCache.allocate(other, 2, 20))


def test_a_mask_over_past_and_new_must_agree_with_the_cache(backend, model):
    mask = np.ones((2, 9), int)
    mask[0, 0] = 0
    past = model(IDS[:, :8], mask[:, :8], use_cache=True).past_key_values
    whole = logits(model(IDS, mask))[:, 8:]
    assert np.allclose(logits(model(IDS[:, 8:], mask, past_key_values=past)), whole, atol=2e-5)
    past = model(IDS[:, :8], mask[:, :8], use_cache=True).past_key_values
    with pytest.raises(MaskError, match="cache holds"):
        model(IDS[:, 8:], np.ones((2, 9), int), past_key_values=past)


@pytest.mark.parametrize("keep", [1, 4, 9, [0, -1, 3]])
def test_logits_to_keep_are_slices_of_all(model, keep):
    every = logits(model(IDS))
    kept = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    assert np.allclose(logits(model(IDS, logits_to_keep=keep)), kept, atol=2e-5)


def test_return_dict_false_leaves_out_what_is_none(model):
    out = model(IDS, labels=IDS, use_cache=False, return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == 2
    named = model(IDS, labels=IDS, use_cache=False)
    assert np.array_equal(plain(named["logits"]), logits(named))
    assert len(named.to_tuple()) == 2
