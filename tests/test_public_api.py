"""The public names, frozen: a change here is a change for users."""

from __future__ import annotations

import mistral_core
from mistral_core import backend as registry

BACKEND = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "GenerationConfig",
    "KVCache",
    "LogitsProcessor",
    "LogitsProcessorList",
    "Ministral3Config",
    "Ministral3ForCausalLM",
    "Ministral3ForQuestionAnswering",
    "Ministral3ForSequenceClassification",
    "Ministral3ForTokenClassification",
    "Ministral3Model",
    "MinistralForCausalLM",
    "MinistralForQuestionAnswering",
    "MinistralForSequenceClassification",
    "MinistralForTokenClassification",
    "MinistralModel",
    "MinistralConfig",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MistralTokenizer",
    "Quantization",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "dequantize",
    "quantize",
}
OWN = {"mistral_torch": {"parallelize"}, "mistral_flax": {"shard"}, "mistral_tf": {"portable"}}
"""What one backend has and the others have not: each framework's own way to several devices, TensorFlow's to files."""
CORE = {
    "AttentionMaskVisualizer",
    "AttentionVisualizer",
    "Conversation",
    "MistralCommonTokenizer",
    "pipeline",
    "PRESETS",
    "TINY",
    "AutoConfig",
    "AutoTokenizer",
    "GenerationConfig",
    "LogitsProcessor",
    "LogitsProcessorList",
    "Ministral3Config",
    "MinistralConfig",
    "MistralConfig",
    "MistralError",
    "MistralTokenizer",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "TextIteratorStreamer",
    "TextStreamer",
    "__version__",
    "convert",
}


def test_core():
    assert set(mistral_core.__all__) == CORE
    assert all(getattr(mistral_core, name) is not None for name in CORE)


def test_backends(backend):
    names = BACKEND | OWN[backend.__name__]
    assert set(backend.__all__) == names
    assert all(getattr(backend, name) is not None for name in names)


def test_registered_backends():
    assert registry.names() == ["torch", "flax", "tf"]


def test_a_registered_backend(backend):
    name = backend.__name__.removeprefix("mistral_")
    found = registry.get(name)
    assert found.name == name
    assert found.model_class("MistralForCausalLM") is backend.MistralForCausalLM
