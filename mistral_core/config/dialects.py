"""Config dialects: Hugging Face's config.json of transformers 4 and 5; `params_json` has Mistral's own.

`read` turns any of them into fields of MistralConfig and the keys nobody knows; `write` goes back.
What no dialect may do is choose code or a path: such keys are carried as data and never followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedFeatureError
from ..plain import dtype_name, plain
from ..quantization import schemes
from ..telling import shown, warn
from . import llama, model_types, other_keys, params_json, rope, towers

if TYPE_CHECKING:
    from .config import MistralConfig


def read(data: Mapping[str, Any], *, known: Collection[str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, unknown keys) of a config in any dialect; `known` are the fields that MistralConfig has."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: the top level must be an object, got {type(data).__name__}.")
    if "dim" in data and "n_layers" in data:
        return params_json.read(data, where)
    return _read_hugging_face(data, known, where)


def read_arguments(given: Mapping[str, Any], *, known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, unknown names) of arguments that are called as in Hugging Face's files."""
    given = {name: dtype_name(value) if name in ("dtype", *RENAMED) else plain(value) for name, value in given.items()}
    return _read_hugging_face(given, known, "MistralConfig")


# Hugging Face


def _read_hugging_face(
    data: Mapping[str, Any], known: Collection[str], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    if data.get("model_type") == towers.MODEL_TYPE:
        data = towers.text_of(data, where)
    if data.get("model_type") == "llama":
        data = llama.as_mistral(data, where)
    _refuse_other_models(data, where)
    known = {*known} - {"extra"}
    fields = {key: value for key, value in data.items() if key in known}
    if isinstance(fields.get("architectures"), list):
        fields["architectures"] = model_types.own_classes(fields["architectures"], data.get("model_type", "mistral"))
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
_READ = frozenset({*RENAMED, "rope_parameters", "quantization_config"})
"""Keys that are no fields and are read into some, or asked before."""


def _refuse_other_models(data: Mapping[str, Any], where: str) -> None:
    kind = data.get("model_type", "mistral")
    if not model_types.is_known(kind):
        dense = ", ".join((*model_types.TYPES, "llama"))
        raise UnsupportedFeatureError(
            f"{where}: model_type must be one of {dense} or {towers.MODEL_TYPE}, got {shown(kind)}."
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


def write(config: MistralConfig, *, dialect: str | None = None, with_vision: bool = False) -> dict[str, Any]:
    """The config.json dictionary in the dialect of transformers 4 (`v4`) or 5 (`v5`), unknown keys included.

    None is the oldest that has the model type. `with_vision` gives the config of the model that also sees, where this
    is its text part. Raises ConfigError.
    """
    kind = model_types.TYPES[config.model_type]
    if dialect is None:
        dialect = kind.dialect
    if dialect not in ("v4", "v5"):
        raise ConfigError(f"dialect must be 'v4' or 'v5', got {dialect!r}.")
    data = dict(config.extra)
    for name in sorted({field.name for field in dataclasses.fields(config)} - {"extra"}):
        value = getattr(config, name)
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        data[name] = value
    if config.architectures is not None:
        data["architectures"] = model_types.their_classes(config.architectures, config.model_type)
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
    if with_vision and not isinstance(config.extra.get(towers.MODEL_TYPE), Mapping):
        raise ConfigError("config: must be the text part of a model that also sees, as it was read of its config.json.")
    return towers.whole(data) if with_vision else data
