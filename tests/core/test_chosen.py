"""Tokens that are chosen on the host: those that every backend's `choose` takes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from mistral_core.generation.engine import Chosen
from mistral_core.generation.sampling import Rule, Values
from mistral_core.reference import sampling

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 17)).astype(np.float32)
LOGITS[0, 0, [3, 9]] = 7  # a tie
LOGITS[0, 1, 5] = np.nan
LOGITS[1, 0, 16] = np.inf
LOGITS[1, 1] = -np.inf
LOGITS[2, 2, :16] = -np.inf
VALUES = Values(np.zeros(8, np.float32), np.zeros((3, 2), np.uint32), np.zeros(3, np.int32))


def test_the_likeliest_is_the_reference_s():
    chosen = Chosen.likeliest(LOGITS, VALUES)
    assert chosen.token.dtype == np.int32
    assert np.array_equal(chosen.token, sampling.choose(LOGITS, Rule(), VALUES).token)
    assert chosen.token[0, 0] == 3
    assert chosen.token[2, 2] == 16
    assert (chosen.token == -1).sum() == 3
    assert chosen[1:] == (None, None, None)


def test_the_likeliest_is_what_a_backend_chooses(backend):
    arrays, of_backend = (importlib.import_module(f"{backend.__name__}.{name}") for name in ("arrays", "sampling"))
    found = of_backend.choose(arrays.from_numpy(LOGITS), Rule(), VALUES).token
    assert np.array_equal(arrays.to_numpy(found), Chosen.likeliest(LOGITS, VALUES).token)


@pytest.mark.parametrize("every", [False, True])
def test_nothing_else_may_be_asked_for(every):
    assert Rule(every=every).takes_likeliest(VALUES)
    for other in ({"sample": True}, {"candidates": 2}, {"scores": True}, {"logits": True}, {"normalised": True}):
        assert not Rule(every=every, **other).takes_likeliest(VALUES)
    assert not Rule(every=every).takes_likeliest(VALUES._replace(bias=np.zeros((3, 4, 17), np.float32)))
    assert not Rule(every=every).takes_likeliest(VALUES._replace(seen=np.zeros((3, 4, 17), bool)))
