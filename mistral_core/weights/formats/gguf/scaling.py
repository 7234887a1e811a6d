"""How positions are scaled, as keys of GGUF, both ways: what llama.cpp computes from the keys is what the config says.

Of yarn, llama.cpp multiplies cos and sin by (0.1 ln(factor) + 1) / (0.1 m ln(factor) + 1), m being the log multiplier
(no quotient where it is 0), and then by `attn_factor`; a query of a `mistral3` by 1 + t log(1 + floor(position / n)), t
being the temperature scale and n the original context length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ....config import MistralConfig, rope
from ....errors import CorruptCheckpointError, UnsupportedFeatureError
from ...containers.gguf.scan import Value
from ...containers.tensor_file import quoted
from .keys import Keys, exact, unsigned

TEMPERATURE = "attention.temperature_scale"
"""There in a `mistral3` that is a ministral3, be it 0; llama.cpp reads it in no other of our architectures."""

_KIND, _FACTOR, _ATTENTION = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"
_ORIGINAL = "rope.scaling.original_context_length"
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
_SAID = {_FACTOR: "factor", _ORIGINAL: rope.ORIGINAL, **_BETAS}
"""Key below the architecture's name -> entry of rope_scaling."""
_SAID_OF_QUERIES = {**_SAID, _LOG_MULTIPLIER: "mscale_all_dim", TEMPERATURE: rope.BETA}
"""The same where queries are scaled."""
_MSCALE = {"mscale": 1.0}
"""What llama.cpp takes it to be wherever there is a log multiplier."""
_OF_2023 = "rope.scale_linear"
_OF_OLDER_OLLAMA = "rope.scaling_beta"
"""Its name of the temperature scale, beside other names of yarn's numbers too."""


# Reading


def read(keys: Keys, *, of_queries: bool) -> dict[str, Any] | None:
    """The rope_scaling of a file; `of_queries` where its architecture has a log multiplier and scales queries.

    Raises CorruptCheckpointError for what is no number, UnsupportedFeatureError for other scalings.
    """
    if of_queries and keys.has(_OF_OLDER_OLLAMA) and not keys.has(TEMPERATURE):
        raise UnsupportedFeatureError(
            f"{keys.told(_OF_OLDER_OLLAMA)} is a name that only older versions of Ollama read; get a file that "
            "llama.cpp converted."
        )
    scaling = _rotation(keys, of_queries)
    if keys.has(_ATTENTION) and (scaling or {}).get("rope_type") != "yarn" and keys.number(_ATTENTION) != 1:
        raise UnsupportedFeatureError(
            f"{keys.told(_ATTENTION)} must be 1 without yarn, got {keys.number(_ATTENTION)}; convert it again."
        )
    if not of_queries or not keys.has(TEMPERATURE):
        return scaling
    original = _original_length(keys)
    if original < 1:
        raise CorruptCheckpointError(
            f"{keys.told(_ORIGINAL)} must be 1 or more beside {keys.name(TEMPERATURE)}, got {original}; "
            "convert it again."
        )
    return {**(scaling or {"rope_type": "default"}), rope.ORIGINAL: original, rope.BETA: keys.number(TEMPERATURE)}


def _rotation(keys: Keys, of_queries: bool) -> dict[str, Any] | None:
    kind = keys.get(_KIND) if keys.has(_KIND) else "linear"  # as llama.cpp takes it
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise UnsupportedFeatureError(f"{keys.told(_KIND)} is {quoted(str(kind))}; linear and yarn are read.")
    if kind != "yarn":
        return _linear(keys) if kind == "linear" else None
    scaling = {
        "rope_type": "yarn",
        rope.ORIGINAL: _original_length(keys),
        "factor": keys.number(_FACTOR),
        **{name: keys.number(key) for key, name in _BETAS.items() if keys.has(key)},
    }
    if of_queries and keys.has(_LOG_MULTIPLIER):
        multiplier = keys.number(_LOG_MULTIPLIER)
        if multiplier < 0:
            raise CorruptCheckpointError(
                f"{keys.told(_LOG_MULTIPLIER)} must be 0 or more, got {multiplier}; convert it again."
            )
        scaling |= {**_MSCALE, "mscale_all_dim": multiplier}
    if keys.has(_ATTENTION):
        scaling["attention_factor"] = _times(keys.number(_ATTENTION), scaling)
    return scaling


def _linear(keys: Keys) -> dict[str, Any] | None:
    """A factor under its name of today or of 2023; none is 1."""
    key = next((key for key in (_FACTOR, _OF_2023) if keys.has(key)), None)
    if key is None or (keys.number(key) == 1 and not keys.has(_KIND)):
        return None
    return {"rope_type": "linear", "factor": keys.number(key)}


def _original_length(keys: Keys) -> int:
    return keys.integer(_ORIGINAL if keys.has(_ORIGINAL) else "context_length")


def _times(factor: float, scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by: llama.cpp's key is a float32 factor on top of yarn's own."""
    with np.errstate(over="ignore"):
        product = float(np.float32(factor)) * _own_factor(scaling)
    return float(f"{product:.7g}")  # seven digits are what is left of a float32


def _own_factor(scaling: Mapping[str, Any]) -> float:
    plain = {name: value for name, value in scaling.items() if name != rope.BETA}
    return rope.rotary_table(MistralConfig(rope_scaling=plain)).attention_factor


# Writing


def bounds_matter(config: MistralConfig) -> bool:
    """Whether it has yarn with other bounds than 32 and 1, which llama.cpp takes of every `llama`."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "yarn":
        return False
    plain = {name: value for name, value in config.rope_scaling.items() if name not in _BETAS.values()}
    return not _same(config, config.replace(rope_scaling=plain))


def write(config: MistralConfig, *, of_queries: bool) -> dict[str, Value]:
    """The keys below the architecture's name; raises UnsupportedFeatureError where they cannot say what it says."""
    if config.rope_scaling is None:
        return {}
    scaling = dict(config.rope_scaling)
    kind = scaling["rope_type"]
    if "mscale_all_dim" in scaling and not scaling.get("mscale"):  # neither is used, which the multiplier 0 says
        scaling["mscale_all_dim"] = 0.0
    said = {key: name for key, name in (_SAID_OF_QUERIES if of_queries else _SAID).items() if name in scaling}
    values: dict[str, Value] = {} if kind == "default" else {_KIND: kind}
    for key, name in said.items():
        values[key] = (unsigned if name == rope.ORIGINAL else exact)(name, scaling[name])
    back = {"rope_type": kind, **{name: scaling[name] for name in said.values()}}
    back |= _MSCALE if _LOG_MULTIPLIER in said else {}
    if kind == "yarn":
        wanted, own = rope.rotary_table(config).attention_factor, _own_factor(back)
        if wanted != own:
            values[_ATTENTION] = np.float32(wanted / own)
            back["attention_factor"] = _times(wanted / own, back)
    if kind == "llama3" or back.get("mscale_all_dim", 0) < 0 or not _same(config, config.replace(rope_scaling=back)):
        raise UnsupportedFeatureError(
            f"gguf: cannot say rope_scaling {dict(config.rope_scaling)}; of scalings it has linear and yarn with "
            "truncated bounds and a factor of seven digits on cos and sin; convert it to hf."
        )
    return values


def _same(first: MistralConfig, second: MistralConfig) -> bool:
    """Whether both rotate and scale alike."""
    return rope.rotary_table(first) == rope.rotary_table(second) and (
        rope.query_scaling(first) == rope.query_scaling(second)
    )
