"""Mistral in JAX, with Flax NNX: the mirror of mistral_torch and mistral_tf."""

from typing import Any

from mistral_core.backend import lacking as _lacking

if (_error := _lacking("flax", "jax", "flax")) is not None:
    raise _error

from mistral_core import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MistralTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from mistral_core.compat.names import named as _named

from .auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from .cache import KVCache
from .compat import FlaxAutoModel as FlaxAutoModel
from .compat import FlaxAutoModelForCausalLM as FlaxAutoModelForCausalLM
from .compat import FlaxMistralForCausalLM as FlaxMistralForCausalLM
from .compat import FlaxMistralModel as FlaxMistralModel
from .heads import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
)
from .model import MistralModel
from .quantize import BitsAndBytesConfig, Quantization, dequantize, quantize
from .sharding import shard

# every dense Mistral is one network: its class by the names that transformers has for each model type
MinistralForCausalLM = Ministral3ForCausalLM = MistralForCausalLM
MinistralForQuestionAnswering = Ministral3ForQuestionAnswering = MistralForQuestionAnswering
MinistralForSequenceClassification = Ministral3ForSequenceClassification = MistralForSequenceClassification
MinistralForTokenClassification = Ministral3ForTokenClassification = MistralForTokenClassification
MinistralModel = Ministral3Model = MistralModel

__all__ = [
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
    "MinistralConfig",
    "MinistralForCausalLM",
    "MinistralForQuestionAnswering",
    "MinistralForSequenceClassification",
    "MinistralForTokenClassification",
    "MinistralModel",
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
    "shard",
]


def __getattr__(name: str) -> Any:
    return _named(__name__, name)
