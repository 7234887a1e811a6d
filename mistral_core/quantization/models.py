"""What is done to a finished model of any framework whose parts hold packed matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from ..errors import UnsupportedFeatureError
from . import request
from .matrix import KINDS, PackedMatrix

M = TypeVar("M", bound=Any)


def packed(model: M, put: Callable[[M, str, PackedMatrix], None], quantization: Any, **options: Any) -> M:
    """The model, its matrices packed one after another as `request.given` reads it and `put` puts them.

    What is packed already stays, and takes its activations as asked for. Raises ConfigError, UnsupportedFeatureError,
    NonFiniteWeightsError.
    """
    model._refuse_adapters("quantize")
    config, architecture = model.config.value, model.architecture
    asked = request.given(quantization, **options).resolved(config, architecture)
    already = {name for name, _ in model.packed_parts()}
    for name in asked.matrices(config, architecture):
        if name not in already:
            put(model, name, asked.quantise(name, model._array(name)))
    return round_activations(model, asked.activations)


def round_activations(model: M, activations: str | None) -> M:
    """Let packed integers meet rows rounded to "int8", or, with None, rows as they are; returns the model."""
    for _, part in model.packed_parts():
        part.activations = activations if KINDS[part.kind].is_integer else None
    return model


def refuse_write(package: str) -> NoReturn:
    """Raise UnsupportedFeatureError: floats were assigned to a packed matrix of a model of this package."""
    raise UnsupportedFeatureError(
        "weight must stay as it is: it is packed, and what is merged into it would be lost; call "
        f"{package}.dequantize(model) before merging an adapter, or keep the adapter beside it."
    )
