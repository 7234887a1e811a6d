"""Inverse frequencies of rotary embeddings, for every backend: computed in float64, rounded once to float32.

default  theta^(-2i/H), i = 0 ... H/2-1                        (RoFormer, arXiv 2104.09864, eq. 15)
linear   default / factor                                       (position interpolation, arXiv 2306.15595)
yarn     between the two by wavelength, and a factor on q, k    (YaRN, arXiv 2309.00071, section 3)
llama3   default, / factor, or a blend, by wavelength           (Llama 3.1's published rope_scaling)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import UnsupportedFeatureError
from ..telling import shown

if TYPE_CHECKING:
    from .config import MistralConfig

# type -> (keys it needs, keys it may have)
TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"}),
    ),
    "llama3": (
        frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
        frozenset(),
    ),
}  # fmt: skip


BETA, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
OF_QUERIES = frozenset({BETA, ORIGINAL, "max_position_embeddings"})
"""Keys beside a type's own: how queries are scaled by their position, and a length that transformers repeats there."""

MOST = 1e15
"""Of a number of a scaling: far beyond any that means something, and far below where arithmetic overflows."""


class RotaryTable(NamedTuple):
    """What rotary embeddings need of a config."""

    inverse_frequency: tuple[float, ...]
    """[H/2], each a float32 value."""
    attention_factor: float
    """cos and sin are multiplied by it (yarn), else 1."""


class QueryScaling(NamedTuple):
    """How the query of a position is scaled: 1 + beta log(1 + floor(position / original_length))."""

    beta: float
    original_length: int


LAYER_TYPES = ("full_attention", "sliding_attention")


def check_one_for_all(given: Mapping[str, Any], *, where: str) -> None:
    """Raise UnsupportedFeatureError for a mapping that has an entry for each type of layer.

    A network has one table of rotations, and transformers' own Mistral reads no such mapping either.
    """
    kinds = [kind for kind in given if isinstance(kind, str) and kind.endswith("_attention")]
    if kinds:
        raise UnsupportedFeatureError(
            f"{where}: entries by type of layer, {', '.join(map(shown, kinds))}; one rotation for all layers is read. "
            "Where the entries agree, write what they say once."
        )


def normalised(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    """A rope_scaling mapping with `rope_type` for the old `type`, and None for the default type.

    Raises UnsupportedFeatureError for other types and for keys that the type has no use for.
    """
    scaling = dict(scaling)
    kinds = [scaling.pop(key) for key in ("type", "rope_type") if scaling.get(key) is not None]
    kind = kinds[0] if kinds and kinds.count(kinds[0]) == len(kinds) else None
    scaling = {key: value for key, value in scaling.items() if value is not None or key == "truncate"}
    if not isinstance(kind, str):
        raise UnsupportedFeatureError(
            f"rope_scaling: {shown(kinds or scaling)} needs one rope_type of {', '.join(TYPES)}."
        )
    if kind == "dynamic":
        raise UnsupportedFeatureError(
            "rope_scaling: 'dynamic' changes the base with the length, so cached and uncached text cannot agree; "
            "use 'yarn'."
        )
    if kind not in TYPES:
        raise UnsupportedFeatureError(f"rope_scaling: rope_type {shown(kind)}; known are {', '.join(TYPES)}.")
    needed, optional = TYPES[kind]
    if kind == "default":  # a factor of one is no scaling
        scaling = {key: value for key, value in scaling.items() if not (key in _FACTORS and value == 1)}
    beside = OF_QUERIES if BETA in scaling else frozenset()
    unknown = sorted(str(key) for key in set(scaling) - needed - optional - beside)
    if unknown:
        has = f"it has {sorted(needed | optional)}" if needed else "it scales nothing; say which type is meant"
        raise UnsupportedFeatureError(f"rope_scaling: {kind} has no key {unknown}; {has}.")
    if kind == "default" and BETA not in scaling:
        return None
    if "truncate" in scaling:  # transformers reads null as false
        scaling["truncate"] = bool(scaling["truncate"])
    return {"rope_type": kind, **scaling}


_FACTORS = ("factor", "attention_factor")


def check(scaling: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a normalised rope_scaling mapping."""
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if isinstance(low, int | float) and isinstance(high, int | float) and high <= low:
        yield f"rope_scaling: high_freq_factor {shown(high)} must be above low_freq_factor {shown(low)}"
    needed = TYPES[scaling["rope_type"]][0] | ({ORIGINAL} if BETA in scaling else set())
    for key in sorted(needed - set(scaling)):
        yield f"rope_scaling: {scaling['rope_type']} needs {key!r}"
    for key, value in scaling.items():
        if key in ("rope_type", "truncate", "finetuned"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= abs(value) <= MOST:
            yield f"rope_scaling: {key} must be a number up to {MOST:g}, got {shown(value)}"
        elif key == ORIGINAL and BETA in scaling and value != int(value):
            yield f"rope_scaling: {key} must be an integer, got {value}"
        elif key == BETA and value < 0:
            yield f"rope_scaling: {key} must be 0 or more, got {value}"
        elif value <= 0 and key != BETA and not key.startswith("mscale"):
            yield f"rope_scaling: {key} must be more than 0, got {value}"
        elif key == "factor" and value < 1:
            yield f"rope_scaling: factor must be 1 or more, got {value}"


def rotary_table(config: MistralConfig) -> RotaryTable:
    """Inverse frequencies and attention factor of a config; see the module's formulas."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    factor = 1.0
    if scaling is not None and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling is not None and scaling["rope_type"] == "yarn":
        frequency, factor = _yarn(frequency, scaling, config)
    elif scaling is not None and scaling["rope_type"] == "llama3":
        frequency = _llama3(frequency, scaling)
    return RotaryTable(tuple(float(x) for x in frequency.astype(np.float32)), factor)


def query_scaling(config: MistralConfig) -> QueryScaling | None:
    """How queries are scaled by their position; None where they are not."""
    scaling = config.rope_scaling
    if scaling is None or not scaling.get(BETA):
        return None
    return QueryScaling(float(scaling[BETA]), int(scaling[ORIGINAL]))


def _yarn(frequency: np.ndarray, scaling: Mapping[str, Any], config: MistralConfig) -> tuple[np.ndarray, float]:
    """Fast pairs keep their frequency, slow ones are interpolated, between them a ramp; and mscale."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    head_dim = config.head_dim

    def pair_with(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with(scaling.get("beta_fast", 32)), pair_with(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001  # the published code's guard against division by zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / span, 0, 1)
    return frequency * (1 - ramp) + frequency / factor * ramp, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """0.1 m ln(factor) + 1 (YaRN eq. 22); a ratio of two where mscale and mscale_all_dim are given (DeepSeek-V2)."""

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return float(mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"]))
    return mscale(1.0)


def _llama3(frequency: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Wavelengths above original/low are stretched by factor, below original/high kept, between them blended."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * frequency / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * frequency / factor + blend * frequency
