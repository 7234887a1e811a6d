"""Names in transformers' docs that do not exist here, and what to use instead."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import MissingNameError
from ..telling import nearest

_INT4 = "its nearest scheme is from_pretrained(..., quantization='int4'); files of it load packed by themselves"
_INT8 = "its nearest scheme is from_pretrained(..., quantization='int8')"
_TOKENIZER = "AutoTokenizer (MistralTokenizer) reads every tokenizer file of Mistral's"
_CACHE = "KVCache.allocate(config, batch_size, capacity) makes every kind of cache"
_PIPELINE = "mistral_core.pipeline makes one; its class need not be named"
_TRAINER = "models of mistral_torch can be trained by transformers' own Trainer; those of mistral_tf have fit"

ADVICE: Mapping[str, str] = {
    "pipeline": 'it is in mistral_core and takes backend="torch", "flax" or "tf"',
    "GPTQConfig": _INT4,
    "AwqConfig": _INT4,
    "AWQConfig": _INT4,
    "HqqConfig": _INT4,
    "CompressedTensorsConfig": _INT4,
    "TorchAoConfig": _INT4,
    "QuantoConfig": _INT8,
    "EetqConfig": _INT8,
    "FineGrainedFP8Config": _INT8,
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
    "GenerationMixin": "MistralForCausalLM has its methods, generate among them",
    "FlaxGenerationMixin": "MistralForCausalLM has its methods, generate among them",
    "TFGenerationMixin": "MistralForCausalLM has its methods, generate among them",
    "FlaxPreTrainedModel": "in mistral_flax it is PreTrainedModel",
    "TFPreTrainedModel": "in mistral_tf it is PreTrainedModel",
    "PretrainedConfig": "MistralConfig is every config",
    "PreTrainedConfig": "MistralConfig is every config",
    "PreTrainedTokenizer": _TOKENIZER,
    "PreTrainedTokenizerBase": _TOKENIZER,
    "MistralCommonBackend": "MistralCommonTokenizer of mistral_core is the same",
    "BatchEncoding": "a tokenizer returns a mapping of this kind",
    "AsyncTextIteratorStreamer": "TextIteratorStreamer is iterated by asyncio.to_thread(next, streamer, None)",
    "MaxLengthCriteria": "generate takes max_length and max_new_tokens",
    "MaxTimeCriteria": "generate takes max_time",
    "StopStringCriteria": "generate takes stop_strings and tokenizer",
    "EosTokenCriteria": "generate takes eos_token_id",
    "TemperatureLogitsWarper": "generate takes temperature",
    "TopKLogitsWarper": "generate takes top_k",
    "TopPLogitsWarper": "generate takes top_p",
    "MinPLogitsWarper": "generate takes min_p",
    "TypicalLogitsWarper": "generate takes typical_p",
    "EpsilonLogitsWarper": "generate takes epsilon_cutoff",
    "EtaLogitsWarper": "generate takes eta_cutoff",
    "RepetitionPenaltyLogitsProcessor": "generate takes repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "generate takes no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "generate takes bad_words_ids",
    "MinLengthLogitsProcessor": "generate takes min_length",
    "MinNewTokensLengthLogitsProcessor": "generate takes min_new_tokens",
    "SuppressTokensLogitsProcessor": "generate takes suppress_tokens",
    "PrefixConstrainedLogitsProcessor": "generate takes prefix_allowed_tokens_fn",
    "SequenceBiasLogitsProcessor": "generate takes logit_bias",
    "WatermarkingConfig": "transformers' WatermarkLogitsProcessor can be given as logits_processor",
    "WatermarkDetector": "transformers' own reads the ids that are generated here",
    "CompileConfig": "generate takes compile=",
    "GenerateDecoderOnlyOutput": "generate(return_dict_in_generate=True) returns one with the same fields",
    "GenerateBeamDecoderOnlyOutput": "generate(return_dict_in_generate=True) returns one with the same fields",
    "BaseModelOutputWithPast": "a model's call returns one with the same fields",
    "CausalLMOutputWithPast": "a model's call returns one with the same fields",
    "SequenceClassifierOutputWithPast": "a model's call returns one with the same fields",
    "Pipeline": _PIPELINE,
    "TextGenerationPipeline": _PIPELINE,
    "TextClassificationPipeline": _PIPELINE,
    "TokenClassificationPipeline": _PIPELINE,
    "QuestionAnsweringPipeline": _PIPELINE,
    "DataCollatorWithPadding": "tokenizer(texts, padding=True) makes a batch",
    "DataCollatorWithFlattening": "give texts in one row with document_ids, or transformers' own collator to a Trainer",
    "DataCollatorForTokenClassification": "transformers' own works on what our tokenizer returns",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM loads its text part; pictures are not read",
    "Mistral3Model": "MistralModel loads its text part; pictures are not read",
    "Mistral3Config": "MistralConfig is the config of its text part",
    "AutoProcessor": "a Mistral reads text only: AutoTokenizer",
    "AutoModelForImageTextToText": "a Mistral reads text only: AutoModelForCausalLM",
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


BACKENDS = ("mistral_torch", "mistral_flax", "mistral_tf")
CLASSES = (
    "AutoModel", "AutoModelFor", "MistralFor", "MistralModel", "MinistralFor", "MinistralModel", "Ministral3For",
    "Ministral3Model", "KVCache", "PreTrainedModel",
)  # fmt: skip
"""How the names begin that every backend has, and not the core."""


def named(package: str, name: str) -> Any:
    """What a package has by a name that is not among its public ones, imported when it is asked for.

    Raises MissingNameError with advice for what transformers calls so and is elsewhere, AttributeError with the
    nearest name for any other.
    """
    if name in ("PreTrainedModel", "MistralPreTrainedModel") and package in BACKENDS:
        return importlib.import_module(f"{package}.weights").PreTrainedModel
    if package not in BACKENDS and name.startswith(CLASSES):
        raise MissingNameError(f"{package} has no {name}: it is in {', '.join(BACKENDS)}.")
    if name in ADVICE:
        raise MissingNameError(f"{package} has no {name}: {ADVICE[name]}.")
    known = [] if name.startswith("_") else importlib.import_module(package).__all__
    raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, known)}")
