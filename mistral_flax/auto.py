"""The Auto classes: a class of this package by the name that transformers uses for any model."""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar

import jax
from flax import nnx

from mistral_core import MistralConfig
from mistral_core.compat.arguments import from_transformers
from mistral_core.compat.clients import path_by_either_name
from mistral_core.errors import UnsupportedFeatureError

from .arrays import as_device
from .heads import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
)
from .model import MistralModel
from .weights import PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)


class AutoClass(Generic[M]):
    """What every Auto class is: a name for `model_class`, which its two methods make."""

    model_class: type[M]

    def __init__(self) -> None:
        name = type(self).__name__
        raise UnsupportedFeatureError(f"{name}: call {name}.from_pretrained(path) or {name}.from_config(config).")

    @classmethod
    @path_by_either_name
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> M:
        """The model of a checkpoint; options and errors are those of the class's own `from_pretrained`."""
        return cls.model_class.from_pretrained(path, **options)

    @classmethod
    def from_config(cls, config: MistralConfig, **options: Any) -> M:
        """A model with fresh parameters, of a config with some fields replaced.

        `options` are those fields, attn_implementation, dtype, param_dtype, rngs and device.
        """
        given = from_transformers(
            options, dtype=None, device=None, attn_implementation=None, param_dtype=None, rngs=None
        )
        build = {name: given.pop(name) for name in ("attn_implementation", "param_dtype", "rngs")}
        dtype, device = given.pop("dtype") or "float32", as_device(given.pop("device"))
        model = cls.model_class(MistralConfig.of(config).overridden(**given), dtype=dtype, **build)
        if device is not None:
            nnx.update(model, jax.device_put(nnx.state(model), device))
        return model


class AutoModel(AutoClass[MistralModel]):
    """MistralModel, by `from_pretrained` or `from_config`."""

    model_class = MistralModel


class AutoModelForCausalLM(AutoClass[MistralForCausalLM]):
    """MistralForCausalLM, by `from_pretrained` or `from_config`."""

    model_class = MistralForCausalLM


class AutoModelForSequenceClassification(AutoClass[MistralForSequenceClassification]):
    """MistralForSequenceClassification, by `from_pretrained` or `from_config`."""

    model_class = MistralForSequenceClassification


class AutoModelForTokenClassification(AutoClass[MistralForTokenClassification]):
    """MistralForTokenClassification, by `from_pretrained` or `from_config`."""

    model_class = MistralForTokenClassification


class AutoModelForQuestionAnswering(AutoClass[MistralForQuestionAnswering]):
    """MistralForQuestionAnswering, by `from_pretrained` or `from_config`."""

    model_class = MistralForQuestionAnswering
