"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Array, step: Any, past: Any, **keys: Any) -> Any:
        return jax.checkpoint(lambda x_BTD: layer(x_BTD, step, past, **keys), **options)(x_BTD)

    return run
