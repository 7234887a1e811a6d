"""Configs of the LLaMA architecture that describe a Mistral without a window, in Mistral's words.

transformers' LlamaForCausalLM computes what its MistralForCausalLM computes, and its tensors have the same names; only
the defaults of absent fields differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedFeatureError
from ..parameters import HEADS

_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
}
"""What transformers' LlamaConfig means by an absent field, where its MistralConfig means something else or may."""


def as_mistral(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json of model_type `llama` as one of model_type `mistral`; raises UnsupportedFeatureError."""
    if data.get("pretraining_tp") not in (None, 1):
        raise UnsupportedFeatureError(
            f"{where}: pretraining_tp is {data['pretraining_tp']!r}, which adds up its products in parts; set it to 1."
        )
    result = {**_DEFAULTS, **data, "model_type": "mistral"}
    result.pop("pretraining_tp", None)
    if result.get("num_key_value_heads") is None:
        result["num_key_value_heads"] = result["num_attention_heads"]
    if isinstance(result.get("architectures"), list):
        result["architectures"] = [_class(name, where) for name in result["architectures"]]
    return result


def _class(name: Any, where: str) -> str:
    classes = {each.replace("Mistral", "Llama"): each for each in HEADS}
    if name not in classes:
        raise UnsupportedFeatureError(
            f"{where}: the class {name!r} of a LLaMA; of those {', '.join(classes)} are Mistrals too."
        )
    return classes[name]
