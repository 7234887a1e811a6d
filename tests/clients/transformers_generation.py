"""transformers' own tests of models and of generation, run on our torch classes.

    python tests/clients/transformers_generation.py TESTS [pytest's arguments, as -k greedy]

TESTS is the folder `tests` of the sources of transformers, of the release that is installed: nothing of it is here, and
whoever runs this fetches it. The classes of its Mistral tests, and the models and tokenizers that its tests of
generation fetch from the hub, are replaced by ours; what does not pass is held against the list of reasons in
`transformers_differences.py`. Exit code 0: everything passed or has a reason.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what a test would fetch is replaced, or told of
os.environ.setdefault("RUN_SLOW", "1")

import peers_suite
import torch
import transformers
from our_processors import PROCESSORS
from transformers_differences import ADAPTED, LEFT_OUT, REASONS

import mistral_torch
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.outputs import GenerateOutput

MODELS = (
    "MistralModel",
    "MistralForCausalLM",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralForQuestionAnswering",
)
OUTPUTS = ("GenerateDecoderOnlyOutput", "GenerateBeamDecoderOnlyOutput")
OLD_OUTPUTS = ("GreedySearch", "Sample", "BeamSearch", "BeamSample")
HUB_MODELS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "BartForConditionalGeneration",
    "GPT2LMHeadModel",
    "ImageGPTForCausalImageModeling",
    "T5ForConditionalGeneration",
)
HUB_TOKENIZERS = ("AutoTokenizer", "BartTokenizer", "GPT2Tokenizer")

GPT2S = ("add_prefix_space", "clean_up_tokenization_spaces", "use_fast", "trust_remote_code", "return_token_type_ids")

NOT_MISTRALS = (
    "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size", "is_decoder",
    "forced_eos_token_id", "position_embedding_type", "layer_norm_eps", "norm_eps", "norm_epsilon",
    "layer_norm_epsilon", "batch_norm_eps", "torchscript", "gradient_checkpointing", "chunk_size_feed_forward",
    "_attn_implementation",
)  # fmt: skip
"""What the suite sets on every model's config; a Mistral has none of it, and our config says so."""


class Config(mistral_torch.AutoConfig):
    """Our config, leaving out what the suite says to every model; an epsilon of 1 is beyond what a Mistral may have."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**{name: value for name, value in fields.items() if name not in NOT_MISTRALS})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NOT_MISTRALS and (name, value) != ("rms_norm_eps", 1.0):
            super().__setattr__(name, value)


class Loaded:
    """What is put before our classes: `from_pretrained` also tells what it warned of, in the form that is asked for."""

    _supports_cache_class, _supports_static_cache, _supports_quantized_cache = True, False, False

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model = super().from_pretrained(*arguments, **options)
        if not output_loading_info:
            return model
        said = " ".join(str(each.message) for each in told)
        return model, {"missing_keys": [name for name, _ in model.named_parameters() if name in said]}


class Generated(types.SimpleNamespace):
    """What generate returned, with fields that can be assigned."""


class Generating(Loaded):
    """What is put before our language model."""

    def generate(self, *arguments: Any, **options: Any) -> Any:
        out = super().generate(*arguments, **options)
        return Generated(**{name: getattr(out, name) for name in FIELDS}) if isinstance(out, GenerateOutput) else out

    def prepare_inputs_for_generation(self, input_ids: Any, inputs_embeds: Any = None, **options: Any) -> Any:
        return super().prepare_inputs_for_generation(input_ids, **options)


FIELDS = tuple(GenerateOutput.__annotations__)
OURS = {
    name: type(name, (Generating if name == "MistralForCausalLM" else Loaded, getattr(mistral_torch, name)), {})
    for name in MODELS
}


class OurAuto(mistral_torch.AutoModelForCausalLM):
    """The class that transformers' Auto class finds by the config."""

    model_class = OURS["MistralForCausalLM"]


class HubModel:
    """Any checkpoint of the hub: the small one that is embedded here; options of generate go where they do there."""

    @staticmethod
    def from_pretrained(name: str, *, max_length: Any = None, min_length: Any = None, **options: Any) -> Any:
        model = OurAuto.from_pretrained(TINY_CHECKPOINT, **options)
        for option, value in {"max_length": max_length, "min_length": min_length}.items():
            if value is not None:
                setattr(model.generation_config, option, value)
        return model


class HubTokenizer(mistral_torch.MistralTokenizer):
    """Any tokenizer of the hub: the embedded checkpoint's."""

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> Any:
        return super().from_pretrained(TINY_CHECKPOINT, **{k: v for k, v in options.items() if k not in GPT2S})


class ShortTexts(HubTokenizer):
    """Makes at most five tokens of a text: the lengths that the suite asks for are those of larger vocabularies."""

    def __call__(self, text: Any = None, *arguments: Any, **options: Any) -> Any:
        own = {name: value for name, value in options.items() if name not in GPT2S}
        return super().__call__(text, *arguments, **{"truncation": True, "max_length": 5, **own})


def adapt(case: type) -> None:
    """Let the test case ask what there is here, as `ADAPTED` tells."""
    asked, checked, weights = (getattr(case, name) for name in ASKED)

    def options(self: Any, do_sample: bool = False, config: Any = None) -> dict[str, Any]:
        return {k: v for k, v in asked(self, do_sample, config).items() if k != "remove_invalid_values"}

    def outputs(self: Any, output: Any, config: Any, use_cache: bool = False, **sizes: Any) -> None:
        checked(self, output, config, use_cache=True, **sizes)

    def attentions(self: Any, *, decoder_past_key_values: Any, **sizes: Any) -> None:
        weights(self, decoder_past_key_values=decoder_past_key_values or (), **sizes)

    for name, adapted in zip(ASKED, (options, outputs, attentions), strict=True):
        setattr(case, name, adapted)
    case._check_past_key_values_for_generate = check_cache


ASKED = ("_get_logits_processor_kwargs", "_check_generate_outputs", "_check_attentions_for_generate")


def check_cache(test: Any, batch_size: int, decoder_past_key_values: Any, cache_length: int, config: Any) -> None:
    """The suite's questions of a cache, for ours; beams hand none out."""
    if decoder_past_key_values is None:
        return
    cache = decoder_past_key_values
    assert len(cache.keys) == len(cache.values) == config.num_hidden_layers
    assert cache.length.shape == (batch_size,)
    assert 0 < cache.length.min() <= cache.length.max() <= cache_length  # padding is not counted
    for x in (*cache.keys, *cache.values):
        assert (x.shape[0], *x.shape[2:]) == (batch_size, config.num_key_value_heads, config.head_dim)
        assert x.shape[1] >= cache.length.max()


def substitute(folder: Path) -> list[Path]:
    """Put our classes into the modules of the suite; its files that are to be run."""
    sys.path.insert(0, str(folder.parent))
    pipelines = types.ModuleType("tests.test_pipeline_mixin")  # whose tests Mistral's skip, and which imports a lot
    pipelines.PipelineTesterMixin = type("PipelineTesterMixin", (), {})
    sys.modules[pipelines.__name__] = pipelines

    mistral = importlib.import_module("tests.models.mistral.test_modeling_mistral")
    vars(mistral).update(OURS, MistralConfig=Config)
    mistral.MistralModelTest.all_model_classes = tuple(OURS.values())
    adapt(mistral.MistralModelTest)
    importlib.import_module("tests.test_modeling_common").AutoModelForCausalLM = OurAuto

    outputs = {*OUTPUTS, *(f"{mode}DecoderOnlyOutput" for mode in OLD_OUTPUTS)}
    tokenizers = {"test_utils": ShortTexts, "test_stopping_criteria": HubTokenizer, "test_streamers": HubTokenizer}
    modules = [mistral]
    for name, tokenizer in tokenizers.items():
        modules.append(importlib.import_module(f"tests.generation.{name}"))
        there = vars(modules[-1])
        there.update(dict.fromkeys(outputs & there.keys(), Generated))
        there.update(dict.fromkeys(set(HUB_MODELS) & there.keys(), HubModel))
        there.update(dict.fromkeys(set(HUB_TOKENIZERS) & there.keys(), tokenizer))
    modules.append(importlib.import_module("tests.generation.test_logits_process"))
    vars(modules[-1]).update(PROCESSORS)
    return [Path(module.__file__) for module in modules]


def main() -> int:
    """Run the suite, and print what it was told and what came of it."""
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "generation").is_dir():
        print(__doc__)
        return 2
    code = peers_suite.run(substitute(Path(sys.argv[1]).absolute()), REASONS, left_out=LEFT_OUT, arguments=sys.argv[2:])
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; the suite is told beforehand:")
    for what, sentence in ADAPTED.items():
        print(f"  {what}: {sentence}")
    return code


if __name__ == "__main__":
    sys.exit(main())
