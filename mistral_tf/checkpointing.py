"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow import Tensor

_SEED: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("seed", default=None)
"""The seed [2] of the layer that is computing, for the second time the same; None: it is computed once."""

_DRAWN: contextvars.ContextVar[tuple[Tensor, Iterator[int]] | None] = contextvars.ContextVar("drawn", default=None)
"""The seed [2] that all others are drawn from, and their numbers; None: TensorFlow's own generator gives them."""


@contextlib.contextmanager
def drawn_from(seed: Tensor) -> Iterator[None]:
    """A context in which a seed [2], int32, decides all that is dropped in training."""
    token = _DRAWN.set((seed, itertools.count(1)))
    try:
        yield
    finally:
        _DRAWN.reset(token)


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Tensor, step: Any, past: Any, **seeds: Any) -> Any:
        if past is not None or step.output_attentions:
            return layer(x_BTD, step=step, past=past, **seeds)  # recompute_grad gives back tensors of gradients alone
        seed = fresh_seed()

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
    return fresh_seed() if training else None


def fresh_seed() -> Tensor:
    """A seed [2] that no other part of this call has, of TensorFlow's generator or of `drawn_from`."""
    drawn = _DRAWN.get()
    if drawn is not None:
        return tf.bitwise.bitwise_xor(drawn[0], tf.constant([0, next(drawn[1])], tf.int32))
    return tf.random.uniform([2], maxval=2**31 - 1, dtype=tf.int32)
