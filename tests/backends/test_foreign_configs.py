"""A config of another library, or a dictionary, is taken wherever one of ours is: by what it says of itself."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import ConfigError, MistralError, UnsupportedFeatureError
from mistral_core.weights import checkpoint

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
CLASSES = (
    "MistralModel", "MistralForCausalLM", "MistralForSequenceClassification", "MistralForTokenClassification",
    "MistralForQuestionAnswering",
)  # fmt: skip
OLD_NAMES = {"mistral_flax": "FlaxMistralForCausalLM", "mistral_tf": "TFMistralForCausalLM"}


class Foreign:
    """What another library's config is to us: an object with `to_dict`."""

    def __init__(self, data):
        self.data = data

    def to_dict(self):
        return self.data


KINDS = {"object": lambda config: Foreign(config.to_dict(dialect="v5")), "dictionary": lambda config: config.to_dict()}


@pytest.fixture(params=KINDS)
def given(request):
    """CONFIG as something else than our config."""
    return KINDS[request.param](CONFIG)


def same(config):
    return config.to_dict() == CONFIG.replace(dtype=config.dtype, architectures=config.architectures).to_dict()


def test_it_is_read_as_a_file_is(given):
    assert MistralConfig.of(given) == CONFIG
    assert MistralConfig.of(CONFIG) is CONFIG
    assert GenerationConfig.from_model_config(given) == GenerationConfig.from_model_config(CONFIG)


@pytest.mark.parametrize("architecture", CLASSES)
def test_every_class_takes_it(backend, given, architecture):
    assert same(getattr(backend, architecture)(given).config)


def test_auto_classes_caches_and_assignments_take_it(backend, given):
    model = backend.AutoModelForCausalLM.from_config(given)
    model.config = given
    assert same(model.config)
    assert same(backend.AutoModelForCausalLM.from_config(given, use_cache=CONFIG.use_cache).config)
    cache = importlib.import_module(f"{backend.__name__}.cache").KVCache.allocate(given, 2, 8)
    assert len(cache.keys) == CONFIG.num_hidden_layers
    if old := OLD_NAMES.get(backend.__name__):
        assert same(getattr(backend, old)(given).config)


def test_loading_takes_it(backend):
    own = MistralConfig.from_pretrained(TINY_CHECKPOINT)
    for kind in KINDS.values():
        model = backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, config=kind(own.replace(sliding_window=3)))
        assert model.config.sliding_window == 3


def test_the_tensors_of_a_checkpoint_are_matched_to_it():
    own = MistralConfig.from_pretrained(TINY_CHECKPOINT)
    config, tensors = checkpoint.load(TINY_CHECKPOINT, "MistralForCausalLM", config=Foreign(own.to_dict()))
    assert config == own
    assert all(isinstance(array, np.ndarray) for _, array in tensors)


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (None, ConfigError, "config must be a MistralConfig, transformers' own or a dictionary, got NoneType; "),
        ("mistralai/Mistral-7B-v0.1", ConfigError, r"got str; MistralConfig.from_pretrained"),
        (7, ConfigError, "got int; "),
        (MistralConfig, ConfigError, "got type; "),
        (Foreign({"peft_type": "LORA", "r": 8}), ConfigError, "got Foreign; "),
        (Foreign([1]), ConfigError, "got Foreign; "),
        (Foreign({"model_type": "mixtral"}), UnsupportedFeatureError, "model_type must be .*, got 'mixtral'"),
        (Foreign({**CONFIG.to_dict(), "attention_bias": True}), UnsupportedFeatureError, "attention_bias"),
        (Foreign({**CONFIG.to_dict(), "hidden_size": "many"}), ConfigError, "hidden_size"),
    ],
)
def test_anything_else_is_told(backend, wrong, error, told):
    with pytest.raises(error, match=told):
        backend.MistralForCausalLM(wrong)
    if wrong is not None:
        with pytest.raises(MistralError, match=told):
            backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, config=wrong)


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}]
)
def test_transformers_own_object(backend, fields):
    transformers = pytest.importorskip("transformers")
    sizes = {
        name: getattr(CONFIG, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "rms_norm_eps",
        )
    }  # fmt: skip
    theirs = transformers.MistralConfig(**sizes, **fields)
    config = backend.MistralForCausalLM(theirs).config
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert config.sliding_window == theirs.sliding_window
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    with pytest.raises(UnsupportedFeatureError, match="mixtral"):
        backend.MistralForCausalLM(transformers.MixtralConfig())
