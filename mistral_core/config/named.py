"""The configs of the other model types by transformers' names: a MistralConfig whose absent fields mean theirs."""

from __future__ import annotations

from typing import Any

from .config import MistralConfig


class _OfOneType(type):
    """The metaclass of a name for the configs of one model type, which are MistralConfigs and know their type."""

    model_type: str

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, MistralConfig) and instance.model_type == cls.model_type

    def __call__(cls, *values: Any, **fields: Any) -> MistralConfig:
        return MistralConfig(*values, **{"model_type": cls.model_type, **fields})


class MinistralConfig(MistralConfig, metaclass=_OfOneType):
    """A MistralConfig of model_type `ministral`, whose layers may have windows or not (`layer_types`)."""

    model_type = "ministral"


class Ministral3Config(MistralConfig, metaclass=_OfOneType):
    """A MistralConfig of model_type `ministral3`, which scales queries by their position."""

    model_type = "ministral3"
