"""Mistral in TensorFlow, with Keras 3: the mirror of mistral_torch and mistral_flax."""

from typing import Any

from mistral_core.backend import lacking as _lacking

if (_error := _lacking("tf", "tensorflow", "keras")) is not None:
    raise _error

import keras as _keras

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
from mistral_core.errors import UnsupportedFeatureError as _UnsupportedFeatureError

if _keras.backend.backend() != "tensorflow":
    raise _UnsupportedFeatureError(
        f"mistral_tf: Keras runs on {_keras.backend.backend()!r} and needs TensorFlow here; set the environment "
        "variable KERAS_BACKEND=tensorflow before keras is imported, or use mistral_torch or mistral_flax."
    )

from .auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from .cache import KVCache
from .compat import TFAutoModel as TFAutoModel
from .compat import TFAutoModelForCausalLM as TFAutoModelForCausalLM
from .compat import TFAutoModelForSequenceClassification as TFAutoModelForSequenceClassification
from .compat import TFMistralForCausalLM as TFMistralForCausalLM
from .compat import TFMistralForSequenceClassification as TFMistralForSequenceClassification
from .compat import TFMistralModel as TFMistralModel
from .heads import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
)
from .model import MistralModel
from .quantize import BitsAndBytesConfig, Quantization, dequantize, quantize
from .traces import portable

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
    "portable",
    "quantize",
]


def __getattr__(name: str) -> Any:
    return _named(__name__, name)
