"""Losses, each a float32 mean; where there is nothing to predict the loss is 0.

Formulas: `mistral_core.reference.ops`. Keras' losses and metrics of probabilities, as those of logits, are tables here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

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


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[label] over labels other than `ignore`; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = tf.nn.log_softmax(tf.cast(logits, tf.float32), axis=-1)
    picked = tf.gather(log_probability, tf.where(counted, labels, 0), batch_dims=len(labels.shape))
    count = tf.maximum(tf.reduce_sum(tf.cast(counted, tf.float32)), 1)
    return -tf.reduce_sum(tf.where(counted, picked, 0)) / count


def classification_loss(config: MistralConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=labels.dtype.is_floating)
    if kind == "regression":
        return tf.reduce_mean(tf.square(tf.reshape(logits, tf.shape(labels)) - tf.cast(labels, tf.float32)))
    if kind == "single_label_classification":
        return cross_entropy(logits, tf.reshape(tf.cast(labels, tf.int32), [-1]))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(labels, tf.float32), logits))


def span_loss(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the cross entropies of start and end; a position beyond the text is not counted."""
    length = tf.shape(start_logits)[1]
    start = cross_entropy(start_logits, tf.clip_by_value(start_positions, 0, length), ignore=length)
    end = cross_entropy(end_logits, tf.clip_by_value(end_positions, 0, length), ignore=length)
    return (start + end) / 2
