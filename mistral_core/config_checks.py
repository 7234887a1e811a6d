"""What makes a MistralConfig valid: types, ranges and agreement of its fields, all problems told at once."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import rope
from .errors import ConfigError, UnsupportedFeatureError

if TYPE_CHECKING:
    from .config import MistralConfig

MAX_SIZE = 1 << 31
MAX_PARAMETERS = 1 << 42
DTYPES = ("float64", "float32", "float16", "bfloat16")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "num_labels",
)  # fmt: skip
_FLAGS = ("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict")
_RATES = ("attention_dropout", "classifier_dropout")


def is_int(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float that is not a bool."""
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def normalised(config: MistralConfig) -> dict[str, Any]:
    """Fields whose given form has a simpler equal: sequences as tuples, derived defaults filled in."""
    changes: dict[str, Any] = {}
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.head_dim is None and is_int(heads) and is_int(hidden) and heads > 0 and hidden % heads == 0:
        changes["head_dim"] = hidden // heads
    if config.num_key_value_heads is None:
        changes["num_key_value_heads"] = heads
    for name in ("eos_token_id", "layer_types", "architectures"):
        if isinstance(getattr(config, name), list):
            changes[name] = tuple(getattr(config, name))
    for name in ("rope_theta", "rms_norm_eps", "initializer_range", *_RATES):
        if is_number(getattr(config, name)):
            changes[name] = float(getattr(config, name))
    if isinstance(config.rope_scaling, Mapping):
        changes["rope_scaling"] = rope.normalised(config.rope_scaling)
    changes.update(_labels(config))
    changes["extra"] = dict(config.extra)
    return changes


def _labels(config: MistralConfig) -> dict[str, Any]:
    """id2label decides num_labels; either label map gives the other."""
    id2label, label2id = config.id2label, config.label2id
    if id2label is None and label2id is not None:
        id2label = {index: label for label, index in label2id.items()}
    if id2label is None:
        if not is_int(config.num_labels) or not 0 < config.num_labels < MAX_SIZE:
            return {}
        id2label = {index: f"LABEL_{index}" for index in range(config.num_labels)}
    try:
        id2label = {int(index): str(label) for index, label in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"id2label: {config.id2label!r}; a map from class index to label was expected.") from None
    if label2id is None:
        label2id = {label: index for index, label in id2label.items()}
    return {"id2label": id2label, "label2id": dict(label2id), "num_labels": len(id2label)}


def check(config: MistralConfig) -> None:
    """Raise one ConfigError with every field that is wrong."""
    if config.hidden_act != "silu":
        raise UnsupportedFeatureError(f"hidden_act: {config.hidden_act!r}; a Mistral has 'silu'.")
    problems = [*_check_types(config)]
    if not problems:
        problems = [*_check_values(config)]
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    if config.rms_norm_eps > 1e-2:
        warnings.warn(f"rms_norm_eps is {config.rms_norm_eps}; published Mistrals have 1e-5.", stacklevel=5)


def _check_types(config: MistralConfig):
    if config.head_dim is None and is_int(config.num_attention_heads) and is_int(config.hidden_size):
        yield (
            f"head_dim is not given and hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}: give head_dim"
        )
    for name in _SIZES:
        value = getattr(config, name)
        if value is None and name == "head_dim":
            continue
        if not is_int(value) or not 0 < value < MAX_SIZE:
            yield f"{name}: {value!r}, an integer from 1 to 2^31-1 was expected"
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            yield f"{name}: {getattr(config, name)!r}, true or false was expected"
    for name in ("rope_theta", "rms_norm_eps", "initializer_range", *_RATES):
        if not is_number(getattr(config, name)):
            yield f"{name}: {getattr(config, name)!r}, a finite number was expected"
    for name in ("pad_token_id", "bos_token_id", "sliding_window"):
        value = getattr(config, name)
        if value is not None and not is_int(value):
            yield f"{name}: {value!r}, an integer or null was expected"
    eos = config.eos_token_id
    if eos is not None and not is_int(eos) and not (isinstance(eos, tuple) and eos and all(map(is_int, eos))):
        yield f"eos_token_id: {eos!r}, an integer, a list of integers or null was expected"
    for name, kind in (("rope_scaling", Mapping), ("layer_types", tuple), ("architectures", tuple)):
        value = getattr(config, name)
        if value is not None and not isinstance(value, kind):
            yield f"{name}: {value!r} is {type(value).__name__}, {kind.__name__.lower()} or null was expected"


def _check_values(config: MistralConfig):
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        yield f"head_dim: {config.head_dim} is odd; rotary embeddings need pairs"
    if config.rope_theta <= 1:
        yield f"rope_theta: {config.rope_theta}, more than 1 was expected"
    if config.rms_norm_eps <= 0:
        yield f"rms_norm_eps: {config.rms_norm_eps}, more than 0 was expected"
    if config.rms_norm_eps >= 1:
        yield f"rms_norm_eps: {config.rms_norm_eps}, far below 1 was expected (published Mistrals have 1e-5)"
    if config.initializer_range < 0:
        yield f"initializer_range: {config.initializer_range}, 0 or more was expected"
    for name in _RATES:
        if not 0 <= getattr(config, name) < 1:
            yield f"{name}: {getattr(config, name)}, a rate in [0, 1) was expected"
    if config.sliding_window is not None and config.sliding_window < 1:
        yield f"sliding_window: {config.sliding_window}; write null for no window, else 1 or more"
    yield from _check_layers(config)
    yield from _check_tokens(config)
    if config.rope_scaling is not None:
        yield from rope.check(config.rope_scaling)
    if config.dtype is not None and config.dtype not in DTYPES:
        yield f"dtype: {config.dtype!r}, one of {', '.join(DTYPES)} was expected"
    if config.problem_type is not None and config.problem_type not in PROBLEM_TYPES:
        yield f"problem_type: {config.problem_type!r}, one of {', '.join(PROBLEM_TYPES)} was expected"
    if set(config.id2label or ()) != set(range(config.num_labels)):
        yield f"id2label: keys {sorted(config.id2label or ())}, 0 to {config.num_labels - 1} were expected"
    size = config.hidden_size * (config.vocab_size + config.num_hidden_layers * 3 * config.intermediate_size)
    if size > MAX_PARAMETERS:
        yield f"these sizes make about {size:.1e} parameters; at most {MAX_PARAMETERS:.1e} are accepted"


def _check_layers(config: MistralConfig):
    kinds = config.layer_types
    if kinds is None:
        return
    wrong = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if wrong:
        yield f"layer_types: {wrong}, full_attention or sliding_attention were expected"
    if len(kinds) != config.num_hidden_layers:
        yield f"layer_types: {len(kinds)} entries for num_hidden_layers {config.num_hidden_layers}"
    if "sliding_attention" in kinds and config.sliding_window is None:
        yield "layer_types has sliding_attention but sliding_window is null: give the window"


def _check_tokens(config: MistralConfig):
    for name, ids in (
        ("pad_token_id", (config.pad_token_id,)),
        ("bos_token_id", (config.bos_token_id,)),
        ("eos_token_id", config.eos_token_ids),
    ):
        for token in ids:
            # transformers 4 wrote -1 for "no padding token"
            if token is not None and not (0 <= token < config.vocab_size or (token == -1 and name == "pad_token_id")):
                yield f"{name}: {token} is not in the vocabulary of {config.vocab_size}"


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


def field_names() -> frozenset[str]:
    """The names of all fields of MistralConfig."""
    from .config import MistralConfig

    return frozenset(f.name for f in dataclasses.fields(MistralConfig))
