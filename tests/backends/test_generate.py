"""Greedy generation: the same tokens in every backend, alone and in a batch, with and without compilation."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import GenerationConfig
from mistral_core.errors import EmptyInputError, GenerationConfigError, SequenceTooLongError, TokenIdError
from mistral_core.presets import TINY
from mistral_core.reference import heads

NEW = 2 * TINY.sliding_window + 3
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9))
EXPECTED = heads.greedy(TINY, PARAMETERS, IDS, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def model(backend):
    return backend.MistralForCausalLM(TINY).load_arrays(PARAMETERS)


def new_tokens(out):
    return np.asarray(out)[:, IDS.shape[1] :]


@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("cache", ["auto", "full"])
def test_tokens_are_the_reference_s(model, compile, cache):
    out = model.generate(IDS, max_new_tokens=NEW, compile=compile, cache=cache, eos_token_id=None)
    assert np.array_equal(new_tokens(out), EXPECTED)
    assert np.array_equal(np.asarray(out)[:, : IDS.shape[1]], IDS)


def test_each_row_equals_the_row_alone(model):
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    batch = new_tokens(model.generate(IDS, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None))
    alone = np.asarray(model.generate(IDS[:1, 4:], max_new_tokens=NEW, eos_token_id=None))[:, 5:]
    assert np.array_equal(batch[:1], alone)


def test_a_list_of_end_tokens_ends_rows_one_by_one(model):
    ends = (int(EXPECTED[0, 2]), int(EXPECTED[1, 4]))
    out = new_tokens(model.generate(IDS, max_new_tokens=NEW, eos_token_id=ends, pad_token_id=1))
    for row, wanted in zip(out, EXPECTED, strict=True):
        stop = next(i for i, token in enumerate(wanted) if token in ends) + 1
        assert np.array_equal(row[:stop], wanted[:stop])
        assert (row[stop:] == 1).all()


def test_no_new_tokens_gives_the_prompt_back(model):
    assert np.array_equal(np.asarray(model.generate(IDS, max_new_tokens=0)), IDS)


def test_options_come_before_the_config_and_the_config_before_the_checkpoint_s(model):
    config = GenerationConfig(max_new_tokens=3)
    assert np.asarray(model.generate(IDS, generation_config=config)).shape[1] == IDS.shape[1] + 3
    assert np.asarray(model.generate(IDS, generation_config=config, max_new_tokens=2)).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize(
    ("error", "inputs", "options"),
    [
        (TokenIdError, [[1, TINY.vocab_size]], {}),
        (EmptyInputError, [[]], {}),
        (EmptyInputError, [[1, 2]], {"attention_mask": [[0, 0]]}),
        (GenerationConfigError, [[1]], {"max_new_tokens": -1}),
        (GenerationConfigError, [[1]], {"max_new_tokens": True}),
        (GenerationConfigError, [[1]], {"temperatur": 1.0}),
        (GenerationConfigError, [[1]], {"eos_token_id": TINY.vocab_size}),
        (SequenceTooLongError, [[1]], {"max_new_tokens": TINY.max_position_embeddings}),
    ],
)
def test_errors_come_before_any_work(model, error, inputs, options):
    with pytest.raises(error):
        model.generate(inputs, **options)
