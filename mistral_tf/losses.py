"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`. Within a `tf.distribute`
strategy's `run` the losses of the replicas add up to that of all rows, and so do their gradients. Keras' losses and
metrics of probabilities, as those of logits, are tables here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig

IGNORED = -100

LOSSES: dict[str, Callable[[], keras.losses.Loss]] = {
    "sparse_categorical_crossentropy": lambda: keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=IGNORED
    ),
    "categorical_crossentropy": lambda: keras.losses.CategoricalCrossentropy(from_logits=True),
    "binary_crossentropy": lambda: keras.losses.BinaryCrossentropy(from_logits=True),
    "binary_focal_crossentropy": lambda: keras.losses.BinaryFocalCrossentropy(from_logits=True),
    "categorical_focal_crossentropy": lambda: keras.losses.CategoricalFocalCrossentropy(from_logits=True),
}
"""Names of losses of probabilities -> the same of logits; other names are Keras' own."""

METRICS: dict[str, Callable[[], keras.metrics.Metric]] = {
    "auc": lambda: keras.metrics.AUC(name="auc", from_logits=True),
    "binary_accuracy": lambda: keras.metrics.BinaryAccuracy(name="binary_accuracy", threshold=0.0),
    "precision": lambda: keras.metrics.Precision(name="precision", thresholds=0.0),
    "recall": lambda: keras.metrics.Recall(name="recall", thresholds=0.0),
    **{
        name: functools.partial(
            keras.metrics.MeanMetricWrapper, getattr(keras.losses, name), name=name, from_logits=True
        )
        for name in LOSSES
    },
}
"""Names of metrics of probabilities -> the same of logits; other names are Keras' own."""

ALIASES = {"bce": "binary_crossentropy"}
"""Keras' short names."""


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore: int = -100, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[label] over labels other than `ignore`, and count; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = tf.nn.log_softmax(tf.cast(logits, tf.float32), axis=-1)
    picked = tf.gather(log_probability, tf.where(counted, labels, 0), batch_dims=len(labels.shape))
    losses = _weighted(-tf.where(counted, picked, 0), sample_weight)
    return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(counted, tf.float32))


def classification_loss(
    config: MistralConfig, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=labels.dtype.is_floating)
    if kind == "single_label_classification":
        return cross_entropy(logits, tf.reshape(tf.cast(labels, tf.int32), [-1]), sample_weight=sample_weight)
    labels = tf.reshape(tf.cast(labels, tf.float32), tf.shape(logits))
    if kind == "regression":
        losses = tf.square(logits - labels)
    else:
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return tf.reduce_sum(_weighted(losses, sample_weight)), tf.cast(tf.size(losses), tf.float32)


def _weighted(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Losses [B] or [B, T] times weights of rows [B] or [B, 1], or of each [B, T]."""
    if weight is None:
        return losses
    shape = [-1] if len(losses.shape) == 1 else [tf.shape(weight)[0], -1]
    return losses * tf.reshape(tf.cast(weight, losses.dtype), shape)


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums [2] and counts [2] of the cross entropies of start and end; a position beyond the text is not counted."""
    length = tf.shape(start_logits)[1]
    start, count = cross_entropy(start_logits, tf.clip_by_value(start_positions, 0, length), ignore=length)
    end, end_count = cross_entropy(end_logits, tf.clip_by_value(end_positions, 0, length), ignore=length)
    return tf.stack([start, end]), tf.stack([count, end_count])


def divided(total: Tensor, count: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = tf.cast(over_replicas(count) if num_items_in_batch is None else num_items_in_batch, tf.float32)
    return tf.reduce_mean(total / tf.where(count > 0, count, 1))


def over_replicas(value: Tensor) -> Tensor:
    """The sum over all replicas of a number that no gradient goes through; the number itself where there is one."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(value))
