"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`. Where devices hold parts (pmap,
shard_map), add up sums and counts with `jax.lax.psum`, or give the model the count of all as `num_items_in_batch` and
add up losses and gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core import MistralConfig


def cross_entropy(logits: Array, labels: Array, *, ignore: int = -100) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[label] over labels other than `ignore`, and count; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probability, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(counted, picked, 0).sum(), counted.sum()


def classification_loss(config: MistralConfig, logits: Array, labels: Array) -> tuple[Array, Array]:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=jnp.issubdtype(labels.dtype, jnp.floating))
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    labels = labels.astype(jnp.float32)
    if kind == "regression":
        losses = jnp.square(logits.reshape(labels.shape) - labels)
    else:
        losses = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return losses.sum(), jnp.ones_like(losses).sum()


def span_loss(
    start_logits: Array, end_logits: Array, start_positions: Array, end_positions: Array
) -> tuple[Array, Array]:
    """Sums [2] and counts [2] of the cross entropies of start and end; a position beyond the text is not counted."""
    length = start_logits.shape[1]
    start, count = cross_entropy(start_logits, start_positions.reshape(-1).clip(0, length), ignore=length)
    end, end_count = cross_entropy(end_logits, end_positions.reshape(-1).clip(0, length), ignore=length)
    return jnp.stack([start, end]), jnp.stack([count, end_count])


def divided(total: Array, count: Array, num_items_in_batch: Any = None) -> Array:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = count if num_items_in_batch is None else jnp.asarray(num_items_in_batch)
    return (total / jnp.where(count > 0, count, 1).astype(jnp.float32)).mean()
