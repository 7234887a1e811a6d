"""Config dialects: Hugging Face config.json of transformers 4 and 5, and raw Mistral params.json.

`read` turns any of them into fields of MistralConfig and the keys nobody knows; `write` and `write_raw` go back.
What no dialect may do is choose code or a path: such keys are carried as data and never followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..disk import limits
from ..errors import ConfigError, UnsupportedFeatureError
from ..plain import dtype_name, is_int, plain
from ..quantization import schemes
from ..telling import shown, warn
from . import llama, other_keys, rope

if TYPE_CHECKING:
    from .config import MistralConfig

# params.json key <-> field
RAW = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "tied_embeddings": "tie_word_embeddings",
    "activation": "hidden_act",
    "dtype": "dtype",
}
_RAW_WRITTEN = (
    "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "vocab_size", "rope_theta",
)  # fmt: skip
PARAMS = "params.json"
RAW_REQUIRED = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size")
RAW_POSITIONS = ("max_position_embeddings", "max_seq_len")
RAW_CARRIED: Mapping[str, str] = {
    "model_type": "asked before",
    "max_batch_size": "how many rows the server that wrote it takes at once",
    "model_parallel": "over how many devices it was spread",
}
"""Key of params.json -> why its value changes nothing here: kept for the way back, no warning."""
RAW_ONLY: Mapping[str, tuple[Any, ...]] = {
    "causal": (None, True),
    "use_biases": (None, False),
    "use_cache": (None, True),
    "rope_scaling": (None,),
    "norm_type": (None, "rmsnorm"),
    "qk_norm": (None, False),
}
"""Key of params.json -> the values that say what a Mistral is; any other is refused."""
# not a dense Mistral, with what it is
RAW_REFUSED = {
    "moe": "a mixture of experts (Mixtral)",
    "lora": "a LoRA adapter; merge it into its base first",
    "vision_encoder": "a multimodal model (Pixtral)",
    "multimodal": "a multimodal model",
    "q_lora_rank": "multi-head latent attention (Mistral 4)",
    "kv_lora_rank": "multi-head latent attention (Mistral 4)",
    "qk_nope_head_dim": "multi-head latent attention (Mistral 4)",
    "llama_4_scaling": "Ministral 3 (position-dependent query scale)",
}

# what raw files leave out, as Mistral's own and Hugging Face's converters fill it
RAW_MAX_POSITIONS = 32768
RAW_THETA_WITH_WINDOW = 10000.0


def read(data: Mapping[str, Any], *, known: Collection[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, unknown keys) of a config in any dialect; `known` are the fields that MistralConfig has."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: the top level must be an object, got {type(data).__name__}.")
    if "dim" in data and "n_layers" in data:
        return _read_raw(data, where)
    return _read_hugging_face(data, known, where)


def read_arguments(given: Mapping[str, Any], *, known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, unknown names) of arguments that are called as in Hugging Face's files."""
    given = {name: dtype_name(value) if name in ("dtype", *RENAMED) else plain(value) for name, value in given.items()}
    return _read_hugging_face(given, known, "MistralConfig")


# Hugging Face


def _read_hugging_face(
    data: Mapping[str, Any], known: Collection[str], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    if data.get("model_type") == "llama":
        data = llama.as_mistral(data, where)
    _refuse_other_models(data, where)
    known = {*known} - {"extra"}
    fields = {key: value for key, value in data.items() if key in known}
    _read_labels(fields, where)
    for key, name in RENAMED.items():
        _agree(fields, name, data.get(key), where, key)
    if isinstance(fields.get("dtype"), str):
        fields["dtype"] = fields["dtype"].removeprefix("torch.")
    _read_rotary(fields, data, where)
    if fields.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", 32)
    extra = {key: value for key, value in data.items() if key not in known and key not in _READ}
    fields["extra"] = extra
    return fields, other_keys.unread(extra, _READ)


RENAMED = {"torch_dtype": "dtype"}
"""Older key -> field."""
_READ = frozenset({*RENAMED, "rope_parameters", "model_type", "quantization_config"})
"""Keys that are no fields and are read into some, or asked before."""


def _refuse_other_models(data: Mapping[str, Any], where: str) -> None:
    kind = data.get("model_type", "mistral")
    if kind != "mistral":
        raise UnsupportedFeatureError(
            f"{where}: model_type is {shown(kind)}; only 'mistral' and 'llama' are dense Mistrals."
        )
    other_keys.check(data, where=where)
    if data.get("quantization_config") is not None:  # its tensors are dequantised as they are read
        schemes.check(data["quantization_config"], where=where)


def _read_labels(fields: dict[str, Any], where: str) -> None:
    """Absent where they are null; a count that is not the number of names is warned of, and the names decide."""
    for name in ("id2label", "label2id"):
        if fields.get(name) is None:
            fields.pop(name, None)
    count, names = fields.get("num_labels"), fields.get("id2label", fields.get("label2id"))
    if count is not None and isinstance(names, Mapping) and count != len(names):
        warn(f"{where}: num_labels is {shown(count)}, but {len(names)} labels are named, and they decide.")


def _read_rotary(fields: dict[str, Any], data: Mapping[str, Any], where: str) -> None:
    """Theta and scaling of both dialects, transformers 5 having them in one object; said twice, they must agree."""
    told = []
    for name in ("rope_scaling", "rope_parameters"):
        given = data.get(name)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: {name} must be an object, got {shown(given)}.")
        rope.check_one_for_all(given, where=f"{where}: {name}")
        given = dict(given)
        other_keys.check({key: given.pop(key) for key in ("partial_rotary_factor",) if key in given}, where=where)
        _agree(fields, "rope_theta", given.pop("rope_theta", None), where, f"{name}.rope_theta")
        if name == "rope_parameters" and given.get("rope_type") is None and given.get("type") is None:
            given["rope_type"] = "default"
        told.append(rope.normalised(_with_original_length(given, data, where)))
    if len(told) == 2 and told[0] != told[1]:
        raise ConfigError(
            f"{where}: rope_scaling {shown(data['rope_scaling'])} and rope_parameters "
            f"{shown(data['rope_parameters'])} disagree; keep one."
        )
    if told:
        fields["rope_scaling"] = told[-1]


def _with_original_length(given: dict[str, Any], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some files say original_max_position_embeddings outside of the scaling, and transformers lets that one win."""
    key = "original_max_position_embeddings"
    if key in data and given.get("rope_type", given.get("type")) != "default":
        _agree(given, key, data[key], where, f"rope_scaling.{key}")
    return given


def _agree(fields: dict[str, Any], name: str, value: Any, where: str, key: str) -> None:
    if fields.get(name) is not None and value is not None and fields[name] != value:
        raise ConfigError(f"{where}: {name} {shown(fields[name])} and {key} {shown(value)} disagree; keep one.")
    if value is not None:
        fields[name] = value


def write(config: MistralConfig, *, dialect: str = "v4") -> dict[str, Any]:
    """The config.json dictionary in the dialect of transformers 4 (`v4`) or 5 (`v5`), unknown keys included."""
    if dialect not in ("v4", "v5"):
        raise ConfigError(f"dialect must be 'v4' or 'v5', got {dialect!r}.")
    data = {**config.extra, "model_type": "mistral"}
    for name in sorted({field.name for field in dataclasses.fields(config)} - {"extra"}):
        value = getattr(config, name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        data[name] = value
    data["id2label"] = {str(index): label for index, label in data["id2label"].items()}
    del data["num_labels"]
    for name in ("architectures", "layer_types", "problem_type"):
        if data[name] is None:
            del data[name]
    dtype = data.pop("dtype")
    if dialect == "v4":
        data["torch_dtype"] = dtype
    else:
        data["dtype"] = dtype
        del data["rope_theta"], data["rope_scaling"]
        data["rope_parameters"] = config.rope_parameters
    return data


# Raw Mistral


def _read_raw(data: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    _refuse_other_raw(data, where)
    if data.get("quantization") is not None:
        schemes.check_raw(data["quantization"], where=where)
    missing = [key for key in RAW_REQUIRED if data.get(key) is None]
    if missing:
        raise ConfigError(f"{where}: params.json lacks {missing}.")
    fields = {name: data[key] for key, name in RAW.items() if data.get(key) is not None}
    fields.setdefault("num_key_value_heads", data["n_heads"])
    positions = [data[key] for key in RAW_POSITIONS if data.get(key) is not None]
    fields["max_position_embeddings"] = positions[0] if positions else RAW_MAX_POSITIONS
    if len(positions) == 2 and positions[0] != positions[1]:
        names = " and ".join(f"{key} {shown(data[key])}" for key in RAW_POSITIONS)
        warn(f"{where}: {names} differ; the first is taken.")
    fields.update(_raw_window(data, where))
    if "rope_theta" not in fields:
        if fields["sliding_window"] is None:
            raise ConfigError(
                f"{where}: rope_theta is absent and there is no window, which means 1e4 to some readers and 1e6 to "
                'others; add "rope_theta" (1e6 for Mistral-7B-v0.2 and later).'
            )
        fields["rope_theta"] = RAW_THETA_WITH_WINDOW
    if data.get("yarn"):
        fields["rope_scaling"] = _raw_yarn(data["yarn"], where)
    others = _raw_others(data)
    if others:
        fields["extra"] = {PARAMS: others}
    harmless = {*RAW_CARRIED, *RAW_ONLY, *RAW_REFUSED}
    return fields, {key: value for key, value in others.items() if key not in harmless}


def _raw_others(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a params.json that are read into no field."""
    read = {*RAW, *RAW_POSITIONS, "quantization", "sliding_window", "_sliding_window", "yarn"}
    return {key: value for key, value in data.items() if key not in read}


def _refuse_other_raw(data: Mapping[str, Any], where: str) -> None:
    for key, what in RAW_REFUSED.items():
        if data.get(key):
            raise UnsupportedFeatureError(f"{where}: {key} says this is {what}.")
    if data.get("model_type", "transformer") != "transformer":
        raise UnsupportedFeatureError(
            f"{where}: model_type is {shown(data['model_type'])}; only 'transformer' is read."
        )
    wrong = [f"{key} is {shown(data[key])}" for key, allowed in RAW_ONLY.items() if data.get(key) not in allowed]
    if wrong:
        raise UnsupportedFeatureError(f"{where}: {', '.join(wrong)}; a Mistral has none of that.")


def _raw_window(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One window, or a list of windows repeated over the layers; digits in a string count as a number here."""
    given = [data[key] for key in ("sliding_window", "_sliding_window") if data.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{where}: both sliding_window and _sliding_window; keep one.")
    window = given[0] if given else None
    if not isinstance(window, list):
        return {"sliding_window": _raw_int(window)}
    layers = data["n_layers"]
    limits.check(len(window), limits.LAYERS, what="windows", where=where, error=ConfigError)
    windows = [_raw_int(entry) for entry in window]
    if not windows or not is_int(layers) or layers % len(windows):
        raise ConfigError(f"{where}: {len(windows)} windows do not divide n_layers {shown(layers)}.")
    limits.check(layers, limits.LAYERS, what="layers", where=where, error=ConfigError)
    if not all(entry is None or is_int(entry) for entry in windows):
        raise ConfigError(f"{where}: windows must be integers or null, got {shown(window)}.")
    sizes = sorted({entry for entry in windows if entry is not None})
    if len(sizes) > 1:
        raise UnsupportedFeatureError(f"{where}: windows of several sizes {sizes}; one size per model is supported.")
    if None not in windows:
        return {"sliding_window": sizes[0]}
    kinds = ["full_attention" if entry is None else "sliding_attention" for entry in windows]
    layer_types = kinds * (layers // len(kinds)) if sizes else None
    return {"sliding_window": sizes[0] if sizes else None, "layer_types": layer_types}


def _raw_int(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value


def _raw_yarn(yarn: Any, where: str) -> dict[str, Any]:
    """params.json's beta and alpha are beta_fast and beta_slow; apply_scale false means no attention factor."""
    if not isinstance(yarn, Mapping):
        raise ConfigError(f"{where}: yarn must be an object, got {type(yarn).__name__}.")
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "beta": "beta_fast",
        "alpha": "beta_slow",
    }
    unknown = sorted(set(yarn) - set(names) - {"apply_scale"})
    if unknown:
        raise UnsupportedFeatureError(f"{where}: yarn has unknown keys {unknown}.")
    scaling = {"rope_type": "yarn", **{names[key]: value for key, value in yarn.items() if key in names}}
    if yarn.get("apply_scale") is False:
        scaling["attention_factor"] = 1.0
    return scaling


def write_raw(config: MistralConfig) -> dict[str, Any]:
    """The params.json dictionary; UnsupportedFeatureError where it cannot say what the config says."""
    keys = {name: key for key, name in RAW.items()}
    others = config.extra.get(PARAMS)
    data = _raw_others(others) if isinstance(others, Mapping) else {}
    data |= {keys[name]: getattr(config, name) for name in _RAW_WRITTEN}
    windows = config.layer_windows
    if len(set(windows)) > 1:
        data["sliding_window"] = list(windows)
    elif windows[0] is not None:
        data["sliding_window"] = windows[0]
    data["max_position_embeddings"] = config.max_position_embeddings
    if config.tie_word_embeddings:
        data["tied_embeddings"] = True
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "yarn":
        data["yarn"] = {
            "factor": scaling["factor"],
            "original_max_position_embeddings": scaling["original_max_position_embeddings"],
            "beta": scaling.get("beta_fast", 32),
            "alpha": scaling.get("beta_slow", 1),
            "apply_scale": rope.rotary_table(config).attention_factor != 1.0,
        }
    fields, _ = _read_raw(data, PARAMS)
    found = config.replace(rope_scaling=fields.get("rope_scaling"), rope_theta=fields["rope_theta"])
    if rope.rotary_table(config) != rope.rotary_table(found):
        raise UnsupportedFeatureError(
            f"raw: {PARAMS} cannot say rope_scaling {dict(scaling or {})}; of scalings it has yarn with or without "
            "its attention factor."
        )
    return data
