"""Names that transformers' documentation imports and this project has not: each with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import MissingNameError

_QUANTIZED = "weights are not quantized here; load them with dtype='bfloat16'"
_TOKENIZER = "AutoTokenizer (MistralTokenizer) reads every tokenizer file of Mistral's"
_CACHE = "KVCache.allocate(config, batch_size, capacity) makes every kind of cache"
_TRAINER = "models of mistral_torch can be trained by transformers' own Trainer; those of mistral_tf have fit"

ADVICE: Mapping[str, str] = {
    "pipeline": 'it is in mistral_core and takes backend="torch", "flax" or "tf"',
    "BitsAndBytesConfig": _QUANTIZED,
    "GPTQConfig": _QUANTIZED,
    "AwqConfig": _QUANTIZED,
    "QuantoConfig": _QUANTIZED,
    "TorchAoConfig": _QUANTIZED,
    "LlamaTokenizer": _TOKENIZER,
    "LlamaTokenizerFast": _TOKENIZER,
    "MistralCommonTokenizer": "it is in mistral_core",
    "PreTrainedTokenizerFast": _TOKENIZER,
    "Cache": _CACHE,
    "DynamicCache": _CACHE,
    "StaticCache": _CACHE,
    "SlidingWindowCache": _CACHE,
    "HybridCache": _CACHE,
    "Trainer": _TRAINER,
    "TrainingArguments": _TRAINER,
    "DataCollatorForLanguageModeling": "tokenizer(texts, padding=True) makes a batch; give its ids as labels too",
    "AttentionMaskVisualizer": "it is in mistral_core and takes backend=",
    "MistralPreTrainedModel": "each class has its methods",
    "AutoModelForMultipleChoice": "a Mistral answers by AutoModelForCausalLM or AutoModelForSequenceClassification",
    "set_seed": "generate takes seed=...; otherwise torch.manual_seed or keras.utils.set_random_seed decides",
    "FlaxMistralModel": "it is in mistral_flax",
    "FlaxMistralForCausalLM": "it is in mistral_flax",
    "FlaxAutoModel": "it is in mistral_flax",
    "FlaxAutoModelForCausalLM": "it is in mistral_flax",
    "TFMistralModel": "it is in mistral_tf",
    "TFMistralForCausalLM": "it is in mistral_tf",
    "TFMistralForSequenceClassification": "it is in mistral_tf",
    "TFAutoModel": "it is in mistral_tf",
    "TFAutoModelForCausalLM": "it is in mistral_tf",
    "TFAutoModelForSequenceClassification": "it is in mistral_tf",
}
"""Name -> what to use."""


def missing(package: str, name: str) -> Exception:
    """The error of a package that is asked for a name it has not: MissingNameError with advice, or AttributeError."""
    if name in ADVICE:
        return MissingNameError(f"{package} has no {name}: {ADVICE[name]}.")
    return AttributeError(f"module {package!r} has no attribute {name!r}")
