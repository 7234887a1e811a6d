"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Array, *arrays: Any, **keywords: Any) -> Any:
        call = functools.partial(layer, **keywords)
        return jax.checkpoint(call, **options)(x_BTD, *arrays)

    return run
