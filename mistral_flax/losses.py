"""Losses, each a float32 mean; where there is nothing to predict the loss is 0.

Formulas: `mistral_core.reference.ops`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core import MistralConfig


def cross_entropy(logits: Array, labels: Array, *, ignore: int = -100) -> Array:
    """Mean of -log softmax(logits)[label] over labels other than `ignore`; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probability, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counted, picked, 0).sum() / jnp.maximum(counted.sum(), 1)


def classification_loss(config: MistralConfig, logits: Array, labels: Array) -> Array:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=jnp.issubdtype(labels.dtype, jnp.floating))
    if kind == "regression":
        return jnp.square(logits.reshape(labels.shape) - labels.astype(jnp.float32)).mean()
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    labels = labels.astype(jnp.float32)
    return (jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))).mean()


def span_loss(start_logits: Array, end_logits: Array, start_positions: Array, end_positions: Array) -> Array:
    """Mean of the cross entropies of start and end; a position beyond the text is not counted."""
    length = start_logits.shape[1]
    start = cross_entropy(start_logits, start_positions.reshape(-1).clip(0, length), ignore=length)
    end = cross_entropy(end_logits, end_positions.reshape(-1).clip(0, length), ignore=length)
    return (start + end) / 2
