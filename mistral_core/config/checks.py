"""What makes a MistralConfig valid: types, ranges and agreement of its fields, all problems told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

from ..disk import limits
from ..errors import ConfigError, UnsupportedFeatureError
from ..plain import dtype_name, is_int, is_number, plain
from ..telling import shown, warn
from . import model_types, rope

if TYPE_CHECKING:
    from .config import MistralConfig

MAX_PARAMETERS = limits.PARAMETERS
DTYPES = ("float64", "float32", "float16", "bfloat16")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_SIZES = {
    "vocab_size": limits.VOCABULARY,
    "hidden_size": limits.WIDTH,
    "intermediate_size": limits.WIDTH,
    "num_hidden_layers": limits.LAYERS,
    "num_attention_heads": limits.HEADS,
    "num_key_value_heads": limits.HEADS,
    "head_dim": limits.HEAD_DIM,
    "max_position_embeddings": limits.POSITIONS,
    "num_labels": limits.LABELS,
}
"""Field -> the most that is accepted of it."""
_LENGTHS = {
    "layer_types": limits.LAYERS,
    "id2label": limits.LABELS,
    "label2id": limits.LABELS,
    "eos_token_id": limits.VOCABULARY,
}
"""Field -> how many entries it may have."""
_FLAGS = ("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict")
_RATES = ("attention_dropout", "classifier_dropout")


def normalised(config: MistralConfig) -> dict[str, Any]:
    """Fields whose given form has a simpler equal: plain numbers, sequences as tuples, derived defaults filled in.

    Raises ConfigError for what would cost much to look at.
    """
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    too_long = _too_long(given)
    if too_long:
        raise ConfigError("; ".join(too_long) + ".")
    changes = {name: plain(value) for name, value in given.items() if name != "extra"}
    changes["dtype"] = dtype_name(given["dtype"])
    heads, hidden = changes["num_attention_heads"], changes["hidden_size"]
    if changes["head_dim"] is None and is_int(heads) and is_int(hidden) and heads > 0 and hidden % heads == 0:
        changes["head_dim"] = hidden // heads
    if changes["num_key_value_heads"] is None:
        changes["num_key_value_heads"] = heads
    for name in ("eos_token_id", "layer_types", "architectures"):
        if isinstance(changes[name], list):
            changes[name] = tuple(changes[name])
    for name in ("rope_theta", "rms_norm_eps", "initializer_range", *_RATES):
        if is_number(changes[name]):
            changes[name] = float(changes[name])
    if isinstance(changes["rope_scaling"], Mapping):
        changes["rope_scaling"] = rope.normalised(changes["rope_scaling"])
    if not isinstance(given["extra"], Mapping):
        raise ConfigError(f"extra must be a mapping, got {shown(given['extra'])}.")
    return {**changes, **_labels(changes), "extra": dict(given["extra"])}


def _too_long(given: Mapping[str, Any]) -> list[str]:
    """What is longer than its limit, told before anything is made of it."""
    return [
        f"{name}: {len(given[name])} entries, at most {most} are accepted"
        for name, most in _LENGTHS.items()
        if isinstance(given[name], Sized) and getattr(given[name], "shape", None) != () and len(given[name]) > most
    ]


def _labels(given: Mapping[str, Any]) -> dict[str, Any]:
    """id2label decides num_labels; either label map gives the other. Raises ConfigError."""
    id2label, label2id, count = given["id2label"], given["label2id"], given["num_labels"]
    if label2id is not None and not (isinstance(label2id, Mapping) and all(map(is_int, label2id.values()))):
        raise ConfigError(f"label2id must be a map from label to class index, got {shown(label2id)}.")
    if id2label is None and label2id is not None:
        id2label = {index: label for label, index in label2id.items()}
    if id2label is None:
        if not is_int(count) or not 0 < count <= limits.LABELS:
            return {}
        id2label = {index: f"LABEL_{index}" for index in range(count)}
    try:
        id2label = {int(index): str(label) for index, label in id2label.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"id2label must be a map from class index to label, got {shown(id2label)}.") from None
    if label2id is None:
        label2id = {label: index for index, label in id2label.items()}
    return {"id2label": id2label, "label2id": dict(label2id), "num_labels": len(id2label)}


def check(config: MistralConfig) -> None:
    """Raise one ConfigError with every field that is wrong."""
    if config.hidden_act != "silu":
        raise UnsupportedFeatureError(f"hidden_act: {shown(config.hidden_act)}; a Mistral has 'silu'.")
    if not model_types.is_known(config.model_type):
        raise UnsupportedFeatureError(
            f"model_type must be one of {', '.join(model_types.TYPES)}, got {shown(config.model_type)}."
        )
    problems = [*_check_types(config)]
    if not problems:
        problems = [*_check_values(config)]
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    if config.rms_norm_eps > 1e-2:
        warn(f"rms_norm_eps is {config.rms_norm_eps}; published Mistrals have 1e-5.")


def _check_types(config: MistralConfig) -> Iterator[str]:
    if config.head_dim is None and is_int(config.num_attention_heads) and is_int(config.hidden_size):
        yield (
            f"head_dim is not given and hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}: give head_dim"
        )
    for name, most in _SIZES.items():
        value = getattr(config, name)
        if value is None and name == "head_dim":
            continue
        if not is_int(value) or not 0 < value <= most:
            yield f"{name} must be an integer from 1 to {most}, got {shown(value)}"
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            yield f"{name} must be true or false, got {shown(getattr(config, name))}"
    for name in ("rope_theta", "rms_norm_eps", "initializer_range", *_RATES):
        if not is_number(getattr(config, name)):
            yield f"{name} must be a finite number, got {shown(getattr(config, name))}"
    for name in ("pad_token_id", "bos_token_id", "sliding_window"):
        value = getattr(config, name)
        if value is not None and not is_int(value):
            yield f"{name} must be an integer or null, got {shown(value)}"
    eos = config.eos_token_id
    if eos is not None and not is_int(eos) and not (isinstance(eos, tuple) and eos and all(map(is_int, eos))):
        yield f"eos_token_id must be an integer, a list of integers or null, got {shown(eos)}"
    if config.rope_scaling is not None and not isinstance(config.rope_scaling, Mapping):
        yield f"rope_scaling must be an object or null, got {shown(config.rope_scaling)}"
    for name in ("layer_types", "architectures"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, tuple) and all(isinstance(each, str) for each in value)):
            yield f"{name} must be a list of names or null, got {shown(value)}"
    for name, known in (("dtype", DTYPES), ("problem_type", PROBLEM_TYPES)):
        value = getattr(config, name)
        if value is not None and value not in known:
            yield f"{name} must be one of {', '.join(known)}, got {shown(value)}"


def _check_values(config: MistralConfig) -> Iterator[str]:
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        yield f"head_dim: {config.head_dim} is odd; rotary embeddings need pairs"
    if config.rope_theta <= 1:
        yield f"rope_theta must be more than 1, got {config.rope_theta}"
    if config.rms_norm_eps <= 0:
        yield f"rms_norm_eps must be more than 0, got {config.rms_norm_eps}"
    if config.rms_norm_eps >= 1:
        yield f"rms_norm_eps must be far below 1 (published Mistrals have 1e-5), got {config.rms_norm_eps}"
    if config.initializer_range < 0:
        yield f"initializer_range must be 0 or more, got {config.initializer_range}"
    for name in _RATES:
        if not 0 <= getattr(config, name) < 1:
            yield f"{name} must be a rate in [0, 1), got {getattr(config, name)}"
    if config.sliding_window is not None and not 1 <= config.sliding_window <= limits.POSITIONS:
        yield (
            f"sliding_window: {shown(config.sliding_window)}; write null for no window, else an integer from 1 to "
            f"{limits.POSITIONS}"
        )
    yield from _check_layers(config)
    yield from _check_tokens(config)
    if config.rope_scaling is not None:
        yield from rope.check(config.rope_scaling)
    if (config.model_type == "ministral3") != (rope.BETA in (config.rope_scaling or {})):
        yield (
            f"rope_scaling: {rope.BETA} must be there in model_type ministral3 and nowhere else, got model_type "
            f"{config.model_type} with {shown(dict(config.rope_scaling or {}))}"
        )
    if set(config.id2label or ()) != set(range(config.num_labels)):
        yield f"id2label: the keys must be 0 to {config.num_labels - 1}, got {shown(sorted(config.id2label or ()))}"
    of_heads = config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    of_layers = config.num_hidden_layers * (3 * config.intermediate_size + of_heads)
    size = config.hidden_size * (config.vocab_size + of_layers)
    if size > MAX_PARAMETERS:
        yield f"these sizes make about {size:.1e} parameters; at most {MAX_PARAMETERS:.1e} are accepted"


def _check_layers(config: MistralConfig) -> Iterator[str]:
    kinds = config.layer_types
    if kinds is None:
        return
    wrong = sorted(set(kinds) - set(rope.LAYER_TYPES))
    if wrong:
        yield f"layer_types: each must be full_attention or sliding_attention, got {shown(wrong)}"
    if len(kinds) != config.num_hidden_layers:
        yield f"layer_types: {len(kinds)} entries for num_hidden_layers {config.num_hidden_layers}"
    if "sliding_attention" in kinds and config.sliding_window is None:
        yield "layer_types has sliding_attention but sliding_window is null: give the window"


def _check_tokens(config: MistralConfig) -> Iterator[str]:
    for name, ids in (
        ("pad_token_id", (config.pad_token_id,)),
        ("bos_token_id", (config.bos_token_id,)),
        ("eos_token_id", config.eos_token_ids),
    ):
        for token in ids:
            # transformers 4 wrote -1 for "no padding token"
            if token is not None and not (0 <= token < config.vocab_size or (token == -1 and name == "pad_token_id")):
                yield f"{name}: {shown(token)} is not in the vocabulary of {config.vocab_size}"


def check_agree(first: MistralConfig, second: MistralConfig, *, where: str) -> None:
    """Raise ConfigError where config.json and params.json describe different models."""
    told_by_both = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "sliding_window", "layer_windows",
        "tie_word_embeddings",
    )  # fmt: skip
    different = [
        f"{name}: {getattr(first, name)} and {getattr(second, name)}"
        for name in told_by_both
        if getattr(first, name) != getattr(second, name)
    ]
    if different:
        raise ConfigError(
            f"{where}: config.json and params.json disagree on {'; '.join(different)}; "
            "read one of them by its own path, or correct one."
        )
