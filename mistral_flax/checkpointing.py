"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Array, step: Any, past: Any, **keys: Any) -> Any:
        def layer_of(x_BTD: Array) -> Any:
            return layer(x_BTD, step, past, **keys)

        if not options and jax.default_backend() == "cpu":
            return _again_when_due(layer_of, x_BTD)
        return jax.checkpoint(layer_of, **options)(x_BTD)

    return run


def _again_when_due(layer: Callable[[Array], Any], x_BTD: Array) -> Any:
    """`jax.checkpoint` for XLA on CPUs: what is computed again waits for the gradient of the layer's output.

    There the barrier of `jax.checkpoint` is taken away before operations are put in order, so all layers are computed
    again before the first gradient, and all activations are in memory together. Here the input of the second time is
    computed of that gradient. It has gradients of gradients but no derivative that goes forward first.
    """
    of_arrays, closed_over = jax.closure_convert(layer, x_BTD)

    def run(x_BTD: Array, closed_over: Any) -> Any:
        return of_arrays(x_BTD, *closed_over)

    def forth(x_BTD: Array, closed_over: Any) -> Any:
        return jax.checkpoint(run)(x_BTD, closed_over), (x_BTD, closed_over)

    def back(kept: Any, gradients: Any) -> Any:
        x_BTD, closed_over = kept
        # x itself, but where a gradient is infinite, of which nothing good comes either way
        due_BTD = jnp.where(jnp.isposinf(gradients[0]), jnp.nan, x_BTD)
        return jax.vjp(run, due_BTD, closed_over)[1](gradients)

    once = jax.custom_vjp(run)
    once.defvjp(forth, back)
    return once(x_BTD, closed_over)
