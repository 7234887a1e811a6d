"""The model types that are a dense Mistral: how each calls its classes, and what it means by an absent field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..parameters import HEADS


class ModelType(NamedTuple):
    """A `model_type` of Hugging Face's configs."""

    classes: str
    """What the names of its classes have where ours have `Mistral`."""
    defaults: Mapping[str, Any]
    """Field -> what its absence means, where that is not what it means in `mistral`."""
    dialect: str
    """The oldest dialect in which transformers reads the type."""


TYPES = {
    "mistral": ModelType("Mistral", {}, "v4"),
    "ministral": ModelType("Ministral", {}, "v5"),
    "ministral3": ModelType(
        "Ministral3",
        {
            "vocab_size": 131072,
            "num_hidden_layers": 34,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "sliding_window": None,
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "v5",
    ),
}
"""The defaults are those of transformers' config classes of these types."""


def is_known(name: Any) -> bool:
    """Whether a value that a file has is the name of a type."""
    return isinstance(name, str) and name in TYPES


def own_classes(names: Iterable[Any], model_type: str) -> list[Any]:
    """Names of classes as ours: of `ministral3`, Ministral3ForCausalLM is MistralForCausalLM; others stay."""
    ours = {theirs: own for own, theirs in _classes(model_type).items()}
    return [ours.get(name, name) if isinstance(name, str) else name for name in names]


def their_classes(names: Iterable[str], model_type: str) -> list[str]:
    """Names of our classes as the type calls them."""
    theirs = _classes(model_type)
    return [theirs.get(name, name) for name in names]


def _classes(model_type: str) -> dict[str, str]:
    return {name: name.replace("Mistral", TYPES[model_type].classes, 1) for name in HEADS}
