"""The raw dialect: Mistral's own params.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..disk import limits
from ..errors import ConfigError, UnsupportedFeatureError
from ..plain import is_int
from ..quantization import schemes
from ..telling import shown, warn
from . import rope

if TYPE_CHECKING:
    from .config import MistralConfig

# params.json key <-> field
FIELDS = {
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
_WRITTEN = (
    "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "vocab_size", "rope_theta",
)  # fmt: skip
PARAMS = "params.json"
REQUIRED = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size")
POSITIONS = ("max_position_embeddings", "max_seq_len")
CARRIED: Mapping[str, str] = {
    "model_type": "asked before",
    "max_batch_size": "how many rows the server that wrote it takes at once",
    "model_parallel": "over how many devices it was spread",
    "vision_encoder": "a network of its own: the text part is read",
}
"""Key of params.json -> why its value changes nothing here: kept for the way back, no warning."""
ONLY: Mapping[str, tuple[Any, ...]] = {
    "causal": (None, True),
    "use_biases": (None, False),
    "use_cache": (None, True),
    "rope_scaling": (None,),
    "norm_type": (None, "rmsnorm"),
    "qk_norm": (None, False),
}
"""Key of params.json -> the values that say what a Mistral is; any other is refused."""
VISION = ("vision_encoder",)
"""Keys of params.json that tell of a vision tower, which is not among the weights of the text part."""
# not a dense Mistral, with what it is
REFUSED = {
    "moe": "a mixture of experts (Mixtral)",
    "lora": "a LoRA adapter; merge it into its base first",
    "multimodal": "a multimodal model",
    "q_lora_rank": "multi-head latent attention (Mistral 4)",
    "kv_lora_rank": "multi-head latent attention (Mistral 4)",
    "qk_nope_head_dim": "multi-head latent attention (Mistral 4)",
    "qk_rope_head_dim": "multi-head latent attention (Mistral 4)",
    "v_head_dim": "multi-head latent attention (Mistral 4)",
}

# what raw files leave out, as Mistral's own and Hugging Face's converters fill it
ABSENT_POSITIONS = 32768
THETA_WITH_WINDOW = 10000.0


def read(data: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields, unknown keys) of a params.json; raises ConfigError, UnsupportedFeatureError."""
    _refuse_others(data, where)
    if data.get("quantization") is not None:
        schemes.check_raw(data["quantization"], where=where)
    missing = [key for key in REQUIRED if data.get(key) is None]
    if missing:
        raise ConfigError(f"{where}: params.json lacks {missing}.")
    fields = {name: data[key] for key, name in FIELDS.items() if data.get(key) is not None}
    fields.setdefault("num_key_value_heads", data["n_heads"])
    positions = [data[key] for key in POSITIONS if data.get(key) is not None]
    fields["max_position_embeddings"] = positions[0] if positions else ABSENT_POSITIONS
    if len(positions) == 2 and positions[0] != positions[1]:
        names = " and ".join(f"{key} {shown(data[key])}" for key in POSITIONS)
        warn(f"{where}: {names} differ; the first is taken.")
    fields.update(_window(data, where))
    if "rope_theta" not in fields:
        if fields["sliding_window"] is None:
            raise ConfigError(
                f"{where}: rope_theta is absent and there is no window, which means 1e4 to some readers and 1e6 to "
                'others; add "rope_theta" (1e6 for Mistral-7B-v0.2 and later).'
            )
        fields["rope_theta"] = THETA_WITH_WINDOW
    if data.get("yarn"):
        fields["rope_scaling"] = _yarn(data["yarn"], where)
    fields["model_type"] = "ministral" if fields.get("layer_types") else "mistral"
    if data.get("yarn") or data.get("llama_4_scaling"):
        fields["model_type"] = "ministral3"
        fields["rope_scaling"] = _query_scaling(data.get("llama_4_scaling"), fields.get("rope_scaling"), where)
    others = _others(data)
    if others:
        fields["extra"] = {PARAMS: others}
    harmless = {*CARRIED, *ONLY, *REFUSED}
    return fields, {key: value for key, value in others.items() if key not in harmless}


def _others(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a params.json that are read into no field."""
    read = {*FIELDS, *POSITIONS, "quantization", "sliding_window", "_sliding_window", "yarn", "llama_4_scaling"}
    return {key: value for key, value in data.items() if key not in read}


def _refuse_others(data: Mapping[str, Any], where: str) -> None:
    for key, what in REFUSED.items():
        if data.get(key):
            raise UnsupportedFeatureError(f"{where}: {key} says this is {what}.")
    if data.get("model_type", "transformer") != "transformer":
        raise UnsupportedFeatureError(
            f"{where}: model_type is {shown(data['model_type'])}; only 'transformer' is read."
        )
    wrong = [f"{key} is {shown(data[key])}" for key, allowed in ONLY.items() if data.get(key) not in allowed]
    if wrong:
        raise UnsupportedFeatureError(f"{where}: {', '.join(wrong)}; a Mistral has none of that.")


def _window(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One window, or a list of windows repeated over the layers; digits in a string count as a number here."""
    given = [data[key] for key in ("sliding_window", "_sliding_window") if data.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{where}: both sliding_window and _sliding_window; keep one.")
    window = given[0] if given else None
    if not isinstance(window, list):
        return {"sliding_window": _int(window)}
    layers = data["n_layers"]
    limits.check(len(window), limits.LAYERS, what="windows", where=where, error=ConfigError)
    windows = [_int(entry) for entry in window]
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


def _int(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value


def _yarn(yarn: Any, where: str) -> dict[str, Any]:
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


def _query_scaling(given: Any, scaling: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The scaling of rotary embeddings, if any, and of queries, in one object as config.json has them."""
    names = {"beta": rope.BETA, "original_max_position_embeddings": rope.ORIGINAL}
    if given is None:
        return {**(scaling or {}), rope.BETA: 0.0}
    if not isinstance(given, Mapping) or set(given) != set(names):
        raise ConfigError(f"{where}: llama_4_scaling must be an object of {' and '.join(names)}, got {shown(given)}.")
    result = dict(scaling or {"rope_type": "default"})
    original = given["original_max_position_embeddings"]
    if result.get(rope.ORIGINAL, original) != original:
        raise UnsupportedFeatureError(
            f"{where}: llama_4_scaling and yarn must have one original_max_position_embeddings, got {shown(original)} "
            f"and {shown(result[rope.ORIGINAL])}."
        )
    return result | {names[key]: value for key, value in given.items()}


def write(config: MistralConfig, *, with_vision: bool = False) -> dict[str, Any]:
    """The params.json dictionary; UnsupportedFeatureError where it cannot say what the config says.

    What was said of a vision tower is said again only `with_vision`, for it is not among the weights otherwise.
    """
    keys = {name: key for key, name in FIELDS.items()}
    others = config.extra.get(PARAMS)
    data = _others(others) if isinstance(others, Mapping) else {}
    data = {key: value for key, value in data.items() if with_vision or key not in VISION}
    data |= {keys[name]: getattr(config, name) for name in _WRITTEN}
    windows = config.layer_windows
    if len(set(windows)) > 1:
        data["sliding_window"] = list(windows)
    elif windows[0] is not None:
        data["sliding_window"] = windows[0]
    data["max_position_embeddings"] = config.max_position_embeddings
    if config.tie_word_embeddings or config.model_type == "ministral3":  # whose files always say it
        data["tied_embeddings"] = config.tie_word_embeddings
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "yarn":
        data["yarn"] = {
            "factor": scaling["factor"],
            "original_max_position_embeddings": scaling["original_max_position_embeddings"],
            "beta": scaling.get("beta_fast", 32),
            "alpha": scaling.get("beta_slow", 1),
            "apply_scale": rope.rotary_table(config).attention_factor != 1.0,
        }
    if scaling is not None and scaling.get(rope.BETA):
        data["llama_4_scaling"] = {"beta": scaling[rope.BETA], rope.ORIGINAL: scaling[rope.ORIGINAL]}
    fields, _ = read(data, PARAMS)
    told = ("rope_scaling", "rope_theta", "model_type")
    found = config.replace(**{"rope_scaling": None, **{name: fields[name] for name in told if name in fields}})
    if (rope.rotary_table(config), rope.query_scaling(config)) != (rope.rotary_table(found), rope.query_scaling(found)):
        raise UnsupportedFeatureError(
            f"raw: {PARAMS} cannot say rope_scaling {dict(scaling or {})}; of scalings it has yarn with or without "
            "its attention factor."
        )
    return data
