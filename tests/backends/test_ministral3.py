"""Texts that go past the length before yarn, where queries are scaled: the reference's tokens in every backend."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from conformance.pieces import by_name
from conformance.weights import random_parameters
from mistral_core import Ministral3Config, MistralConfig
from mistral_core.errors import MissingNameError
from mistral_core.reference import engine

SCALING = by_name("query-scale").config.rope_scaling | {"llama_4_scaling_beta": 0.8}
FULL, ROLLING = (
    by_name(name).config.replace(num_hidden_layers=1, rope_scaling=SCALING)
    for name in ("query-scale", "query-scale-far")
)
NEW = 14
IDS = np.random.default_rng(1).integers(3, FULL.vocab_size, (2, 9))
MASK = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1] * 9])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": NEW, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 30, "seed": 7}
CLASSES = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.mark.parametrize(
    ("config", "options"),
    [(FULL, {}), (FULL, SAMPLED), (ROLLING, {}), (ROLLING, {"cache": "full"})],
    ids=["no window", "sampled", "rolling cache", "full cache"],
)
def test_tokens_past_the_original_length_are_the_reference_s(backend, config, options):
    parameters = random_parameters(config, "MistralForCausalLM")
    model = backend.MistralForCausalLM(config).load_arrays(parameters)
    said_of_the_cache = {"cache"} & options.keys()
    expected = engine.generate(
        config, parameters, IDS, **OPTIONS, **{k: v for k, v in options.items() if k not in said_of_the_cache}
    )
    # whichever takes less: in JAX, operations that stand alone are compiled for every length of a growing cache
    compile = "auto" if backend.__name__ == "mistral_flax" else "off"
    assert np.array_equal(model.generate(IDS, **OPTIONS, compile=compile, **options), expected.sequences)
    without = config.replace(rope_scaling={**config.rope_scaling, "llama_4_scaling_beta": 0.0})
    assert not np.array_equal(engine.generate(without, parameters, IDS, **OPTIONS).sequences, expected.sequences)


@pytest.mark.feature("Ministral 3, and the text part of Mistral Small 3.1 and Devstral 2")
def test_a_checkpoint_of_ministral3_comes_back_as_one(backend, tmp_path):
    model = backend.Ministral3ForCausalLM(FULL)
    model.save_pretrained(tmp_path)
    data = MistralConfig.from_pretrained(tmp_path).to_dict()
    assert (data["model_type"], data["architectures"]) == ("ministral3", ["Ministral3ForCausalLM"])
    again = backend.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.config, Ministral3Config)
    assert isinstance(again, backend.MistralForCausalLM)
    first, second = (each.generate(IDS, **OPTIONS, compile="off") for each in (model, again))
    assert np.array_equal(first, second)


def test_every_class_has_the_names_of_every_type(backend):
    for name in CLASSES:
        classes = {getattr(backend, f"{kind}{name}") for kind in ("Mistral", "Ministral", "Ministral3")}
        assert len(classes) == 1
    with pytest.raises(MissingNameError, match="loads its text part"):
        importlib.import_module(backend.__name__).Mistral3ForConditionalGeneration  # noqa: B018
