"""The config of a Mistral as keys of GGUF's architectures `llama` and `mistral3`, both ways.

`mistral3` is what llama.cpp makes of a ministral3, and of a mistral out of a model that also sees; its keys are those
of `llama` and a few more, and it heeds yarn's bounds, which `llama` does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....config import MistralConfig, rope
from ....errors import CorruptCheckpointError, UnsupportedFeatureError
from ...containers.gguf.file import GgufFile
from ...containers.gguf.scan import Value
from ...containers.tensor_file import quoted
from . import scaling
from .keys import Keys, exact, unsigned

ARCHITECTURE = "general.architecture"
ARCHITECTURES = {"llama": False, "mistral3": True}
"""Architecture, with which the names of its keys begin -> whether llama.cpp scales its queries by their position."""
EOS_IDS = "mistral.eos_token_ids"
"""Ours: where a config has several, of which GGUF takes the first."""

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
"""Key without its architecture -> field."""
_NUMBERS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
_WINDOW = "attention.sliding_window"
_REQUIRED = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
"""Key as it is -> field."""
_ABSENT: dict[str, Any] = {"rope_theta": 10000.0, "sliding_window": None, "head_dim": None, "pad_token_id": None}
"""Field -> what llama.cpp takes an absent key for, whatever the model type."""


# Reading


def read(file: GgufFile) -> dict[str, Any]:
    """Fields of MistralConfig; raises UnsupportedFeatureError for another model, CorruptCheckpointError."""
    keys, whole = _keys_of_architecture(file), Keys(file)
    fields = dict(_ABSENT)
    fields |= {name: keys.integer(key) for key, name in _SIZES.items() if keys.has(key)}
    fields |= {name: keys.number(key) for key, name in _NUMBERS.items() if keys.has(key)}
    fields |= {name: whole.integer(key) for key, name in _IDS.items() if whole.has(key)}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("vocab_size", _vocabulary(keys))
    if whole.has(EOS_IDS):
        fields["eos_token_id"] = _ids(file)
    if keys.has(_WINDOW):
        fields["sliding_window"] = keys.integer(_WINDOW) or None
    found = scaling.read(keys, of_queries=ARCHITECTURES[keys.architecture])
    fields["rope_scaling"] = found
    fields["model_type"] = "ministral3" if rope.BETA in (found or {}) else "mistral"
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    _check_heads(keys)
    if fields["num_hidden_layers"] > len(file.tensors):
        raise CorruptCheckpointError(
            f"{file.path}: {fields['num_hidden_layers']} layers and {len(file.tensors)} tensors; copy the file again."
        )
    return fields


def _keys_of_architecture(file: GgufFile) -> Keys:
    """The keys that describe the model, none of the required ones missing."""
    kind, whole = file.values.get(ARCHITECTURE), Keys(file)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = " and ".join(map(repr, ARCHITECTURES))
        raise UnsupportedFeatureError(f"{file.path}: the architecture is {quoted(str(kind))}; {known} are read.")
    keys = Keys(file, kind)
    _refuse(keys, "expert_count", "a mixture of experts (Mixtral)")
    _refuse(whole, "split.count", "one part of a split file; join the parts with llama-gguf-split --merge")
    missing = [keys.name(key) for key in _REQUIRED if not keys.has(key)]
    if missing:
        raise CorruptCheckpointError(f"{file.path}: lacks the keys {', '.join(missing)}; convert it again.")
    return keys


def _refuse(keys: Keys, key: str, what: str) -> None:
    """Raise UnsupportedFeatureError where a count is above 1."""
    value = keys.get(key)
    if isinstance(value, np.integer) and int(value) > 1:
        raise UnsupportedFeatureError(f"{keys.told(key)} is {value}: {what}.")


def _check_heads(keys: Keys) -> None:
    lengths = {keys.name(key): keys.integer(key) for key, to in _SIZES.items() if to == "head_dim" and keys.has(key)}
    if len(set(lengths.values())) > 1:
        raise UnsupportedFeatureError(
            f"{keys.file.path}: {lengths} differ; a Mistral has one head_dim, rotated as a whole."
        )


def _vocabulary(keys: Keys) -> int:
    tensors = keys.file.tensors
    if keys.has("vocab_size"):
        return keys.integer("vocab_size")
    if "token_embd.weight" not in tensors:
        raise CorruptCheckpointError(
            f"{keys.file.path}: neither {keys.name('vocab_size')} nor token_embd.weight is there; copy the file again."
        )
    return tensors["token_embd.weight"].shape[0]


def _ids(file: GgufFile) -> tuple[int, ...]:
    value = file.values[EOS_IDS]
    if not (isinstance(value, np.ndarray) and value.dtype.kind in "iu"):
        raise CorruptCheckpointError(f"{file.path}: {EOS_IDS} must be integers, got {str(value)[:40]!a}.")
    return tuple(value.tolist())


# Writing


def architecture(config: MistralConfig) -> str:
    """The one in which llama.cpp computes what the config says."""
    return "mistral3" if config.model_type == "ministral3" or scaling.bounds_matter(config) else "llama"


def write(config: MistralConfig) -> dict[str, Value]:
    """The keys of a config; UnsupportedFeatureError where they cannot say what it says."""
    kind = architecture(config)
    if len(set(config.layer_windows)) > 1:
        raise UnsupportedFeatureError(f"gguf: has one window for all layers of a {kind}; convert it to hf.")
    values: dict[str, Value] = {key: unsigned(name, getattr(config, name)) for key, name in _SIZES.items()}
    values |= {key: exact(name, getattr(config, name)) for key, name in _NUMBERS.items()}
    if config.layer_windows[0] is not None:
        values[_WINDOW] = unsigned("sliding_window", config.layer_windows[0])
    values |= scaling.write(config, of_queries=ARCHITECTURES[kind])
    return {**{f"{kind}.{key}": value for key, value in values.items()}, **_write_ids(config)}


def _write_ids(config: MistralConfig) -> dict[str, Value]:
    ids = {name: getattr(config, name) for name in _IDS.values()}
    ids["eos_token_id"] = next(iter(config.eos_token_ids), None)
    values: dict[str, Value] = {key: unsigned(name, ids[name]) for key, name in _IDS.items() if ids[name] is not None}
    if isinstance(config.eos_token_id, tuple):
        values[EOS_IDS] = np.array([unsigned("eos_token_id", each) for each in config.eos_token_id], np.uint32)
    return values
