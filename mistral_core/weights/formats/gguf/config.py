"""The config of a Mistral as keys of GGUF's architecture `llama`, both ways.

Numbers are float32 there: what was meant is the shortest decimal that rounds to the same float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ....config import MistralConfig, rope
from ....errors import CorruptCheckpointError, UnsupportedFeatureError
from ...containers.gguf.file import GgufFile
from ...containers.gguf.scan import Value
from ...containers.tensor_file import quoted

ARCHITECTURE = "general.architecture"
EOS_IDS = "mistral.eos_token_ids"
"""Ours: where a config has several, of which GGUF takes the first."""

_SIZES = {
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.attention.value_length": "head_dim",
    "llama.rope.dimension_count": "head_dim",
    "llama.vocab_size": "vocab_size",
}
_NUMBERS = {"llama.attention.layer_norm_rms_epsilon": "rms_norm_eps", "llama.rope.freq_base": "rope_theta"}
_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_WINDOW = "llama.attention.sliding_window"
_SCALING = "llama.rope.scaling."
_YARN = {"factor": "factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
_REQUIRED = (
    "llama.context_length", "llama.embedding_length", "llama.block_count", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon",
)  # fmt: skip
_REFUSED = {
    "llama.expert_count": "a mixture of experts (Mixtral)",
    "split.count": "one part of a split file; join the parts with llama-gguf-split --merge",
}


# Reading


def read(file: GgufFile) -> dict[str, Any]:
    """Fields of MistralConfig; raises UnsupportedFeatureError for another model, CorruptCheckpointError."""
    values = file.values
    kind = values.get(ARCHITECTURE)
    if kind != "llama":
        raise UnsupportedFeatureError(f"{file.path}: the architecture is {quoted(str(kind))}; only 'llama' is read.")
    for key, what in _REFUSED.items():
        if isinstance(values.get(key), np.integer) and int(_integer(file, key)) > 1:
            raise UnsupportedFeatureError(f"{file.path}: {key} is {values[key]}: {what}.")
    missing = [key for key in _REQUIRED if key not in values]
    if missing:
        raise CorruptCheckpointError(f"{file.path}: lacks the keys {', '.join(missing)}; convert it again.")
    fields: dict[str, Any] = {"rope_theta": 10000.0, "sliding_window": None}
    fields |= {name: _integer(file, key) for key, name in _SIZES.items() if key in values}
    fields |= {name: _float(file, key) for key, name in _NUMBERS.items() if key in values}
    fields |= {name: _integer(file, key) for key, name in _IDS.items() if key in values}
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("vocab_size", _vocabulary(file))
    if EOS_IDS in values:
        fields["eos_token_id"] = _ids(file)
    if _WINDOW in values:
        fields["sliding_window"] = _integer(file, _WINDOW) or None
    fields["rope_scaling"] = _scaling(file)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    _check_heads(file)
    if fields["num_hidden_layers"] > len(file.tensors):
        raise CorruptCheckpointError(
            f"{file.path}: {fields['num_hidden_layers']} layers and {len(file.tensors)} tensors; copy the file again."
        )
    return fields


def _check_heads(file: GgufFile) -> None:
    lengths = {key: _integer(file, key) for key, name in _SIZES.items() if name == "head_dim" and key in file.values}
    if len(set(lengths.values())) > 1:
        raise UnsupportedFeatureError(f"{file.path}: {lengths} differ; a Mistral has one head_dim, rotated as a whole.")


def _scaling(file: GgufFile) -> dict[str, Any] | None:
    kind = file.values.get(f"{_SCALING}type", "none")
    if "llama.rope.scale_linear" in file.values and kind == "none":  # as files of 2023 said it
        factor = _float(file, "llama.rope.scale_linear")
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _float(file, f"{_SCALING}factor")}
    if kind != "yarn":
        raise UnsupportedFeatureError(f"{file.path}: {_SCALING}type is {quoted(str(kind))}; linear and yarn are read.")
    found = {name: _float(file, _SCALING + key) for key, name in _YARN.items() if _SCALING + key in file.values}
    length = _SCALING + "original_context_length"
    scaling = {
        "rope_type": "yarn",
        "original_max_position_embeddings": _integer(file, length if length in file.values else "llama.context_length"),
        **found,
    }
    if f"{_SCALING}attn_factor" in file.values:
        scaling["attention_factor"] = _times(_float(file, f"{_SCALING}attn_factor"), scaling)
    return scaling


def _times(factor: float, scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by: llama.cpp's key is a factor on top of yarn's own."""
    return float(f"{factor * _own_factor(scaling):.7g}")  # seven digits are what is left of a float32


def _own_factor(scaling: Mapping[str, Any]) -> float:
    plain = {"rope_type": "yarn", "original_max_position_embeddings": 1, "factor": scaling["factor"]}
    return rope.rotary_table(MistralConfig(rope_scaling=plain)).attention_factor


def _vocabulary(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CorruptCheckpointError(f"{file.path}: neither llama.vocab_size nor token_embd.weight is there.")
    return file.tensors["token_embd.weight"].shape[0]


def _integer(file: GgufFile, key: str) -> int:
    """An integer, or the one number of an array with one for each layer."""
    value = file.values.get(key)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value):
        if len(set(value.tolist())) > 1:
            raise UnsupportedFeatureError(f"{file.path}: {key} differs from layer to layer; a Mistral's are the same.")
        value = value[0]
    if not isinstance(value, np.integer):
        raise CorruptCheckpointError(f"{file.path}: {key} must be an integer, got {str(value)[:40]!a}.")
    return int(value)


def _float(file: GgufFile, key: str) -> float:
    value = file.values.get(key)
    if not isinstance(value, np.floating):
        raise CorruptCheckpointError(f"{file.path}: {key} must be a number, got {str(value)[:40]!a}.")
    return _decimal(value)


def _decimal(value: np.floating) -> float:
    """The float64 that was meant by a float32."""
    return float(str(value))


def _ids(file: GgufFile) -> tuple[int, ...]:
    value = file.values[EOS_IDS]
    if not (isinstance(value, np.ndarray) and value.dtype.kind in "iu"):
        raise CorruptCheckpointError(f"{file.path}: {EOS_IDS} must be integers, got {str(value)[:40]!a}.")
    return tuple(value.tolist())


# Writing


def write(config: MistralConfig) -> dict[str, Value]:
    """The keys of a config; UnsupportedFeatureError where they cannot say what it says."""
    if len(set(config.layer_windows)) > 1:
        raise UnsupportedFeatureError("gguf: has one window for all layers of a llama; convert it to hf.")
    values: dict[str, Value] = {key: _unsigned(name, getattr(config, name)) for key, name in _SIZES.items()}
    values |= {key: _exact(name, getattr(config, name)) for key, name in _NUMBERS.items()}
    if config.layer_windows[0] is not None:
        values[_WINDOW] = _unsigned("sliding_window", config.layer_windows[0])
    ids = {name: getattr(config, name) for name in _IDS.values()}
    ids["eos_token_id"] = next(iter(config.eos_token_ids), None)
    values |= {key: _unsigned(name, ids[name]) for key, name in _IDS.items() if ids[name] is not None}
    if isinstance(config.eos_token_id, tuple):
        values[EOS_IDS] = np.array([_unsigned("eos_token_id", each) for each in config.eos_token_id], np.uint32)
    return values | _write_scaling(config)


def _write_scaling(config: MistralConfig) -> dict[str, Value]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    values: dict[str, Value] = {f"{_SCALING}type": scaling["rope_type"]}
    values[f"{_SCALING}factor"] = _exact("factor", scaling["factor"])
    back: dict[str, Any] = {"rope_type": scaling["rope_type"], "factor": scaling["factor"]}
    if scaling["rope_type"] == "yarn":
        length = scaling["original_max_position_embeddings"]
        back["original_max_position_embeddings"] = length
        values[f"{_SCALING}original_context_length"] = _unsigned("original_max_position_embeddings", length)
        for key, name in _YARN.items():
            if name in scaling:
                back[name] = scaling[name]
                values[_SCALING + key] = _exact(name, scaling[name])
        wanted, own = rope.rotary_table(config).attention_factor, _own_factor(scaling)
        if wanted != own:
            quotient = np.float32(wanted / own)
            back["attention_factor"] = _times(_decimal(quotient), scaling)
            values[f"{_SCALING}attn_factor"] = quotient
    if scaling["rope_type"] not in ("linear", "yarn") or rope.rotary_table(config) != rope.rotary_table(
        config.replace(rope_scaling=back)
    ):
        raise UnsupportedFeatureError(
            f"gguf: cannot say rope_scaling {dict(scaling)}; of scalings it has linear and yarn with truncated bounds."
        )
    return values


def _unsigned(name: str, value: Any) -> np.uint32:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < 2**32:
        raise UnsupportedFeatureError(f"gguf: {name} must be an integer of 0 to 2^32-1, got {value}; change it.")
    return np.uint32(value)


def _exact(name: str, value: float) -> np.float32:
    with np.errstate(over="ignore", under="ignore"):
        number = np.float32(value)
    if _decimal(number) != value:
        raise UnsupportedFeatureError(
            f"gguf: {name} is {value!r}, which is {_decimal(number)!r} as float32; round it, or convert to hf."
        )
    return number
