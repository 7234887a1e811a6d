"""Positions that begin again tell packed documents, as transformers' DataCollatorWithFlattening gives them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from frameworks import REQUESTED

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import PositionError
from mistral_core.reference import heads
from mistral_core.validate import begins_again

CONFIG = TINY.replace(num_hidden_layers=1)
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
PLACES = np.array([[0, 1, 2, 0, 1, 0, 0, 1, 2]])
DOCUMENTS = np.array([[0, 0, 0, 1, 1, 2, 3, 3, 3]] * 2)
MASK = np.ones((2, 9), int)


def test_the_specification_separates_them():
    told = heads.causal_lm(CONFIG, PARAMETERS, IDS, document_ids=DOCUMENTS).logits
    assert np.array_equal(heads.causal_lm(CONFIG, PARAMETERS, IDS, position_ids=PLACES).logits, told)
    alone = heads.causal_lm(CONFIG, PARAMETERS, IDS[:, 6:]).logits
    assert np.allclose(told[:, 6:], alone)


@pytest.mark.parametrize(
    ("positions", "mask", "documents", "past", "expected"),
    [
        (PLACES, None, None, None, True),
        (PLACES, None, DOCUMENTS, None, False),
        (PLACES, MASK, DOCUMENTS, None, False),
        (np.arange(9)[None], MASK, None, np.zeros(2), False),
        (np.arange(9)[None] * 7, None, None, None, False),
        (np.array([[1, 1, 0, 1, 2]]), np.array([[0, 0, 1, 1, 1]]), None, None, False),  # padding has any place
        (np.array([[4]]), np.ones((1, 9), int), None, np.array([8]), False),
        (None, MASK, None, None, False),
    ],
)
def test_what_begins_again(positions, mask, documents, past, expected):
    assert begins_again(positions, mask, documents, past) == expected


@pytest.fixture(scope="module")
def model(backend):
    model = backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    return model.eval() if backend.__name__ == "mistral_torch" else model


def numpy(backend, array):
    return importlib.import_module(f"{backend.__name__}.arrays").to_numpy(array)


def test_each_document_is_the_document_alone(backend, model):
    wanted = heads.causal_lm(CONFIG, PARAMETERS, IDS, document_ids=DOCUMENTS).logits
    out = model(IDS, position_ids=PLACES)
    assert np.allclose(numpy(backend, out.logits), wanted, atol=1e-4)
    assert out.past_key_values is None  # a next token would see all documents
    assert np.allclose(numpy(backend, model(IDS, position_ids=PLACES[0]).logits), wanted, atol=1e-4)


def test_beside_a_mask_or_a_cache_they_are_refused(backend, model):
    with pytest.raises(PositionError, match="document_ids"):
        model(IDS, MASK, position_ids=PLACES)
    past = model(IDS[:, :3], use_cache=True).past_key_values
    with pytest.raises(PositionError, match="document_ids"):
        model(IDS, position_ids=PLACES, past_key_values=past)


@pytest.mark.parametrize("framework", ["torch", "flax", "tf"])
def test_traced_calls_separate_them_too(framework):
    if framework not in REQUESTED:
        pytest.skip(f"{framework} was not asked for")
    backend = importlib.import_module(f"mistral_{framework}")
    model = backend.MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)

    def call(ids, places):
        return model(ids, position_ids=places, use_cache=False).logits

    if framework == "torch":
        import torch

        ids, places = torch.from_numpy(IDS), torch.from_numpy(PLACES)
        logits = torch.compile(call, fullgraph=True, backend="eager")(ids, places)
    elif framework == "flax":
        import jax

        logits = jax.jit(call)(IDS, PLACES)
    else:
        import tensorflow as tf

        logits = tf.function(call)(tf.constant(IDS, tf.int32), tf.constant(PLACES, tf.int32))
    wanted = heads.causal_lm(CONFIG, PARAMETERS, IDS, document_ids=DOCUMENTS).logits
    assert np.allclose(numpy(backend, logits), wanted, atol=1e-4)
