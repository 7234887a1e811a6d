"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`. Where devices hold parts (pmap,
shard_map), add up sums and counts with `jax.lax.psum`, or give the model the count of all as `num_items_in_batch` and
add up losses and gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core import MistralConfig

from .products import PackedWeight, packed_product, product
from .programs import in_one_program


def cross_entropy(logits: Array, labels: Array, *, ignore: int = -100) -> tuple[Array, Array]:
    """Sum of -log softmax(logits)[label] over labels other than `ignore`, and count; logits [..., V], labels [...]."""
    return -_log_probabilities(logits, labels, ignore).sum(), (labels != ignore).sum()


def _log_probabilities(logits: Array, labels: Array, ignore: int) -> Array:
    """log softmax(logits)[label] of each label, 0 of those that are ignored."""
    counted = labels != ignore
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probability, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(counted, picked, 0)


def chunked_cross_entropy(
    x: Array, weight: Array | PackedWeight, labels: Array, *, rows: int, ignore: int = -100
) -> tuple[Array, Array]:
    """`cross_entropy` of the logits x W^T, of so many rows at a time; x [B, T, D], W [V, D], labels [B, T].

    Gradients make the logits again, as gradient checkpointing does: what is kept is x, and W as it is. Sums are in
    float32 in every dtype, the gradient of W that of each chunk rounded as the product's is; a packed W has none. A
    chunk has some columns of all rows of the batch, which devices may have parts of.
    """
    packed = isinstance(weight, PackedWeight)
    arrays, layout = (tuple(weight[:3]), tuple(weight[3:])) if packed else ((weight,), None)
    return _chunked_sum(x, arrays, layout, labels, rows, ignore), (labels != ignore).sum()


@functools.partial(in_one_program, static_argnums=(2, 4, 5))
def _chunked_sum(
    x_BTD: Array,
    arrays: tuple[Array | None, ...],
    layout: tuple[Any, ...] | None,
    labels_BT: Array,
    rows: int,
    ignore: int,
) -> Array:
    B, T = labels_BT.shape
    columns = max(1, min(rows // B, T))
    after = -T % columns
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, after), (0, 0)))
    labels_BT = jnp.pad(labels_BT, ((0, 0), (0, after)), constant_values=ignore)
    chunks = [jnp.moveaxis(a.reshape(B, -1, columns, *a.shape[2:]), 1, 0) for a in (x_BTD, labels_BT)]
    if layout is None:
        arrays = (arrays[0].astype(jnp.float32),)  # so that its gradient is summed in float32

    @jax.checkpoint
    def one(total: Array, chunk: list[Array]) -> tuple[Array, None]:
        x, labels = chunk
        if layout is None:
            logits = product(x, arrays[0], dtype=jnp.float32)
        else:
            logits = packed_product(x, PackedWeight(*arrays, *layout), dtype=jnp.float32)
        return total + cross_entropy(logits, labels, ignore=ignore)[0], None

    return jax.lax.scan(one, jnp.float32(0), chunks)[0]


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


def label_log_probability(logits: Array, labels: Array, *, ignore: int = -100) -> Array:
    """Sums [B] of log softmax(logits)[label] over labels [B, T] of each row, each predicted by the column before."""
    return _log_probabilities(logits[:, :-1], labels[:, 1:], ignore).sum(-1)


def preference_loss(
    policy_B: Array, reference_B: Array, counted_B: Array, *, beta: float
) -> tuple[Array, Array, Array]:
    """Sum of -log sigmoid(beta * margin) over pairs, their number, and of how many the margin is above 0.

    Formula: `mistral_core.reference.ops.preference_loss`.
    """
    chosen, rejected = jnp.split(policy_B - reference_B, 2)
    margin, pairs = beta * (chosen - rejected), jnp.split(counted_B, 2)[0]
    return jnp.where(pairs, jax.nn.softplus(-margin), 0).sum(), pairs.sum(), (pairs & (margin > 0)).sum()


def divided(total: Array, count: Array, num_items_in_batch: Any = None) -> Array:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = count if num_items_in_batch is None else jnp.asarray(num_items_in_batch)
    return (total / jnp.where(count > 0, count, 1).astype(jnp.float32)).mean()
