"""LLaMAs that are Mistrals without a window: accepted with LLaMA's own defaults, written as Mistrals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mistral_core import MistralConfig, errors
from mistral_core.reference.heads import causal_lm
from mistral_core.weights.checkpoint import load

FOREIGN = Path(__file__).parents[1] / "data" / "foreign" / "llama"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("name", ["plain", "scaled-tied"])
def test_logits_of_transformers(name):
    """Written by make_llama.py with transformers 5.23, whose arithmetic is float32."""
    config, tensors = load(FOREIGN / name)
    assert config.architectures == ("MistralForCausalLM",)
    assert set(config.layer_windows) == {None}
    found = causal_lm(config, dict(tensors), np.array([[1, 7, 40, 2, 33, 9, 21, 5]])).logits
    expected = np.load(FOREIGN / name / "logits.npy")
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_absent_fields_mean_what_llama_means():
    config = MistralConfig.from_dict(LLAMA)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 4096, 11008)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, 32)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope_theta) == (2048, 1e-6, 1e4)
    assert (config.head_dim, config.sliding_window, config.tie_word_embeddings) == (128, None, False)
    assert MistralConfig.from_dict({**LLAMA, "num_attention_heads": 16}).num_key_value_heads == 16
    assert MistralConfig.from_dict({**LLAMA, "num_key_value_heads": None}).num_key_value_heads == 32
    assert MistralConfig.from_dict({**LLAMA, "sliding_window": 5}).sliding_window == 5


@pytest.mark.parametrize("dialect", ["v4", "v5"])
def test_it_is_written_as_a_mistral(dialect):
    given = {**LLAMA, "pretraining_tp": 1, "attention_bias": False, "mlp_bias": False, "rope_theta": 5e5}
    config = MistralConfig.from_dict(given, strict=True)
    data = config.to_dict(dialect=dialect)
    assert data["model_type"] == "mistral"
    assert data["architectures"] == ["MistralForCausalLM"]
    assert data["sliding_window"] is None
    assert "pretraining_tp" not in data
    assert MistralConfig.from_dict(json.loads(json.dumps(data))) == config


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_classes(head):
    config = MistralConfig.from_dict({**LLAMA, "architectures": [f"Llama{head}"]})
    assert config.architectures == (f"Mistral{head}",)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlama"),
        ({"architectures": [3]}, "3"),
        ({"num_local_experts": 8}, "mixture"),
    ],
)
def test_63_llamas_that_are_no_mistrals(fields, match):
    with pytest.raises(errors.UnsupportedFeatureError, match=match):
        MistralConfig.from_dict({**LLAMA, **fields})


@pytest.mark.parametrize("kind", ["mixtral", "pixtral", "mistral_large4", "mistral4", "llama4", "gemma", None, 3])
def test_18_other_models_stay_refused(kind):
    with pytest.raises(errors.UnsupportedFeatureError, match="model_type"):
        MistralConfig.from_dict({"model_type": kind})
