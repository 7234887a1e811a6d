"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

_SEED: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("seed", default=None)
"""The seed [2] of the layer that is computing, for the second time the same; None: it is computed once."""


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Tensor, step: Any, past: Any, **seeds: Any) -> Any:
        if past is not None or step.output_attentions:
            return layer(x_BTD, step=step, past=past, **seeds)  # recompute_grad gives back tensors of gradients alone
        seed = _drawn()

        def seeded(x_BTD: Tensor) -> Tensor:
            token = _SEED.set(seed)
            try:
                return layer(x_BTD, step=step, past=past, **seeds)[0]
            finally:
                _SEED.reset(token)

        return tf.recompute_grad(seeded, **options)(x_BTD), None, None

    return run


def drawn_seed(number: int, training: bool) -> Tensor | None:
    """A seed [2] for what a part of a layer drops in training, by the part's number; None: it drops nothing.

    When a layer is computed again it is the same, and Keras no longer tells that it is training.
    """
    seed = _SEED.get()
    if seed is not None:
        return tf.bitwise.bitwise_xor(seed, tf.constant([number, 0], seed.dtype))
    return _drawn() if training else None


def _drawn() -> Tensor:
    return tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
