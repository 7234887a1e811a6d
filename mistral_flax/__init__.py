"""Mistral in JAX, with Flax NNX: the mirror of mistral_torch and mistral_tf."""

from mistral_core import GenerationConfig, MistralConfig, MistralTokenizer

from .cache import KVCache
from .heads import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
)
from .model import MistralModel

__all__ = [
    "GenerationConfig",
    "KVCache",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MistralTokenizer",
]
