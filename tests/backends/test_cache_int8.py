"""The cache in int8: half of bfloat16's memory, the same text however it is computed; conformance has the numbers."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.config.presets import PRESETS, TINY
from mistral_core.errors import ConfigError, GenerationConfigError, InputError
from mistral_core.reference import engine, heads
from mistral_core.reference.cache import KVCache

CONFIG = TINY.replace(num_hidden_layers=1)
NEW = 2 * CONFIG.sliding_window + 3
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
MASK = np.array([[0] * 4 + [1] * 5, [1] * 9])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": NEW, "eos_token_id": None, "cache_dtype": "int8"}
EXPECTED = engine.generate(CONFIG, PARAMETERS, IDS, **OPTIONS).sequences


@pytest.fixture(scope="module")
def model(backend):
    return backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)


def nbytes(cache):
    arrays = [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]
    return sum(array.nbytes if hasattr(array, "nbytes") else array.numpy().nbytes for array in arrays)


@pytest.mark.feature("A KV cache in int8")
@pytest.mark.parametrize(
    "options",
    [
        {"compile": "auto"},  # compiled in JAX and Keras
        pytest.param({"compile": "on"}, marks=pytest.mark.slow),
        {"cache": "full", "prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_the_text_is_the_reference_s_however_it_is_computed(model, options):
    assert np.array_equal(np.asarray(model.generate(IDS, **OPTIONS, **options)), EXPECTED)


def test_the_text_is_another_than_that_of_a_cache_of_floats():
    """Else the tests here would not see that it was rounded."""
    assert not np.array_equal(
        engine.generate(CONFIG, PARAMETERS, IDS, **OPTIONS | {"cache_dtype": "auto"}).sequences, EXPECTED
    )


def test_a_compiled_loop_carries_it(backend, model):
    if backend.__name__ == "mistral_torch":
        pytest.skip("PyTorch has no compiled loop")
    out = model.generate(IDS, **OPTIONS, on_device_loop=True, return_dict_in_generate=True)
    assert np.array_equal(np.asarray(out.sequences), EXPECTED)
    assert "int8" in str(out.past_key_values.dtype)


def test_beams_reorder_it(model):
    beams = OPTIONS | {"num_beams": 3, "max_new_tokens": 8}
    wanted = engine.generate(CONFIG, PARAMETERS, IDS, **beams).sequences
    assert np.array_equal(np.asarray(model.generate(IDS, **beams)), wanted)


def test_the_next_turn_goes_on_from_it(model):
    """It is rolled back to what the texts have in common, and stays in int8 without being told so."""
    first = model.generate(IDS, **OPTIONS | {"max_new_tokens": 4}, return_dict_in_generate=True)
    longer = np.concatenate([np.asarray(first.sequences)[:, :-2], IDS[:, :3]], axis=1)
    mask = np.concatenate([MASK, np.ones((2, 5), int)], axis=1)
    options = OPTIONS | {"attention_mask": mask}
    wanted = engine.generate(CONFIG, PARAMETERS, longer, **options).sequences
    options.pop("cache_dtype")
    out = model.generate(longer, **options, past_key_values=first, return_dict_in_generate=True)
    assert np.array_equal(np.asarray(out.sequences), wanted)
    assert "int8" in str(out.past_key_values.dtype)


def test_a_turn_that_begins_anew_stays_in_it(monkeypatch):
    """Where the cache has rolled on too far to go back, another is made, of the same dtype."""
    monkeypatch.setattr("mistral_core.generation.engine.LOOKBACK_TOKENS", 0)
    first = engine.generate(CONFIG, PARAMETERS, IDS, **OPTIONS, num_assistant_tokens=1)
    options = OPTIONS | {"attention_mask": None, "max_new_tokens": 4}
    wanted = engine.generate(CONFIG, PARAMETERS, IDS[:, ::-1], **options, num_assistant_tokens=1).sequences
    options.pop("cache_dtype")
    out = engine.generate(CONFIG, PARAMETERS, IDS[:, ::-1], **options, past_key_values=first, num_assistant_tokens=1)
    assert out.past_key_values.dtype == "int8"
    assert np.array_equal(out.sequences, wanted)


def test_rows_and_crops_are_those_of_the_codes_and_of_the_scales(model):
    cache = model.generate(IDS, **OPTIONS, cache="full", return_dict_in_generate=True).past_key_values
    length = np.asarray(cache.length).tolist()
    others = cache.select_rows(np.array([1, 1, 0])).crop(-2)
    assert np.asarray(others.length).tolist() == [length[1] - 2, length[1] - 2, min(length[0], length[1] - 2)]
    for name in ("keys", "values", "key_scales", "value_scales"):
        kept, given = np.asarray(getattr(others, name)[0]), np.asarray(getattr(cache, name)[0])
        assert given.any()
        assert np.array_equal(kept, given[[1, 1, 0]])


def test_a_prompt_sees_itself_as_later_tokens_do(backend, model):
    """In a cache that grows, too; the bound is what a code more or less does, far below what rounding does."""
    wanted, exact = (
        heads.causal_lm(CONFIG, PARAMETERS, IDS, attention_mask=MASK, past_key_values=past).logits
        for past in (KVCache.allocate(CONFIG, 2, dtype=dtype) for dtype in ("int8", "float64"))
    )
    out = model(IDS, attention_mask=MASK, past_key_values=backend.KVCache.allocate(CONFIG, 2, dtype="int8"))
    logits = importlib.import_module(f"{backend.__name__}.arrays").to_numpy(out.logits)
    off, rounded = (np.abs(x - wanted)[MASK != 0].max() for x in (logits, exact))
    assert off < rounded / 10


def test_it_takes_half_of_bfloat16_s_memory(backend):
    config = PRESETS["mistral-7b-v0.1"].replace(num_hidden_layers=1)
    assert config.head_dim == 128
    whole, half = (nbytes(backend.KVCache.allocate(config, 1, 63, dtype=dtype)) for dtype in ("bfloat16", "int8"))
    assert (whole, half) == (64 * 2 * 8 * 256, 64 * 2 * 8 * (128 + 4))


def test_numbers_that_are_none_stay_so(backend):
    """The scale says it, whatever the codes are; generate then tells of logits that hold NaN."""
    cache, arrays = (importlib.import_module(f"{backend.__name__}.{name}") for name in ("cache", "arrays"))
    for number in (np.nan, np.inf):
        x = np.ones((1, 1, 2, 4), np.float32)
        x[0, 0, 0, 1] = number
        given = arrays.from_numpy(x)
        codes, scale = cache.int8_codes(given)
        keys, _ = cache.restored((codes, codes, scale, scale), given.dtype)
        assert np.isnan(np.asarray(keys)[0, 0, 0]).all()
        assert (np.asarray(keys)[0, 0, 1] == 1).all()


def test_another_dtype_is_an_error_that_says_which_there_are(backend, model):
    with pytest.raises(GenerationConfigError, match="cache_dtype must be one of .*'int8'.*got 'int4'"):
        model.generate(IDS, cache_dtype="int4")
    with pytest.raises(GenerationConfigError, match="the nearest is 'cache_dtype'"):
        model.generate(IDS, kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="dtype must be one of .*int8, got 'int4'"):
        backend.KVCache.allocate(CONFIG, 1, 8, dtype="int4")


def test_a_cache_of_another_dtype_than_asked_for_is_an_error(backend, model):
    with pytest.raises(InputError, match="cache_dtype must be 'int8', got float32"):
        model.generate(IDS, cache_dtype="int8", past_key_values=backend.KVCache.allocate(CONFIG, 2, 30))
