"""Configs of models that also see: the text part is a Mistral, and what is said of the rest travels along.

A config.json of model_type `mistral3` has the network that reads text in `text_config`. Its vision tower and projector
are not part of our classes, so `text_of` makes the text part the config, and keeps the other keys for `whole`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedFeatureError
from ..telling import shown
from .model_types import TYPES, is_known

MODEL_TYPE = "mistral3"
"""The model type, and the key under which its own keys are kept."""
_OF_BOTH = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Keys that the text part has from the whole where it lacks them."""
_ABSENT: Mapping[str, Any] = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}
"""The text part of a whole that has no `text_config` at all, as transformers' Mistral3Config has it."""


def text_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the text part, with the rest under the key `mistral3`; raises ConfigError, UnsupportedFeatureError.

    Whether the head is tied is said by the text part, and by the whole where that says nothing: transformers 5 writes
    its own default into the whole of models that are not tied.
    """
    given = data.get("text_config")
    if given is None:
        given = _ABSENT
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: text_config must be an object, got {shown(given)}.")
    kind = given.get("model_type", "mistral")
    if not is_known(kind):
        raise UnsupportedFeatureError(
            f"{where}: model_type of text_config must be one of {', '.join(TYPES)}, got {shown(kind)}."
        )
    text = {key: data[key] for key in _OF_BOTH if data.get(key) is not None}
    if "dtype" in given or "torch_dtype" in given:
        text = {key: value for key, value in text.items() if "dtype" not in key}
    text |= {key: value for key, value in given.items() if value is not None or key not in text}
    if data.get("quantization_config") is not None:
        text["quantization_config"] = data["quantization_config"]
    rest = {key: value for key, value in data.items() if key not in ("text_config", "quantization_config")}
    architecture = "MistralModel" if data.get("architectures") == ["Mistral3Model"] else "MistralForCausalLM"
    return {**text, "model_type": kind, "architectures": [architecture], MODEL_TYPE: rest}


def whole(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model that also sees, of the dictionary of its text part."""
    text = dict(text)
    rest = dict(text.pop(MODEL_TYPE))
    text.pop("architectures", None)
    if "tie_word_embeddings" in rest:
        rest["tie_word_embeddings"] = text["tie_word_embeddings"]
    return {**rest, "text_config": text}
