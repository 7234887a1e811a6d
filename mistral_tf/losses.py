"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`. Within a `tf.distribute`
strategy's `run` the losses of the replicas add up to that of all rows, and so do their gradients. Keras' losses and
metrics of probabilities, as those of logits, are tables here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig

from .products import PackedWeight, as_floats, product
from .traces import sizes

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
    losses = _weighted(-_log_probabilities(logits, labels, ignore), sample_weight)
    return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(labels != ignore, tf.float32))


def _log_probabilities(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """log softmax(logits)[label] of each label, 0 of those that are ignored."""
    counted = labels != ignore
    log_probability = tf.nn.log_softmax(tf.cast(logits, tf.float32), axis=-1)
    picked = tf.gather(log_probability, tf.where(counted, labels, 0), batch_dims=len(labels.shape))
    return tf.where(counted, picked, 0)


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    *,
    rows: int,
    ignore: int = -100,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the logits x W^T, of so many rows at a time; x [B, T, D], W [V, D], labels [B, T].

    Gradients make the logits again, as gradient checkpointing does: what is kept is x, W as it is, and a number for
    each row. Sums are in float32 and rounded once, in every dtype; a packed W has no gradient.
    """
    counted = labels != ignore
    x_RD, label_R = tf.reshape(x, [-1, x.shape[-1]]), tf.reshape(tf.where(counted, labels, 0), [-1])
    packed, count = isinstance(weight, PackedWeight), x_RD.shape[0]
    rows = rows if count is None else min(rows, max(count, 1))

    @tf.custom_gradient
    def row_losses(x_RD: Tensor, *plain: Tensor) -> Any:
        chunks = _cut(rows, x_RD, label_R)
        w_VD = as_floats(weight if packed else plain[0], x_RD)
        loss_CR, log_sum_CR = tf.map_fn(
            lambda chunk: _loss_and_log_sum(*chunk, w_VD),
            chunks,
            parallel_iterations=1,
            fn_output_signature=(tf.float32, tf.float32),
        )

        def gradient(upstream_R: Tensor) -> Any:
            w_VD = as_floats(weight if packed else plain[0], upstream_R)
            x_CRD, label_CR = chunks
            (upstream_CR,) = _cut(rows, upstream_R)

            def one(index: Tensor, dx: tf.TensorArray, dw_VD: Tensor) -> tuple[Any, ...]:
                x = tf.cast(x_CRD[index], tf.float32)
                d_logits = _logits_gradient(x, label_CR[index], log_sum_CR[index], upstream_CR[index], w_VD)
                dx = dx.write(index, tf.cast(_matmul(d_logits, w_VD), x_RD.dtype))
                return index + 1, dx, dw_VD if packed else dw_VD + _matmul(d_logits, x, transpose_a=True)

            count = sizes(label_CR)[0]
            dx = tf.TensorArray(x_RD.dtype, count, element_shape=x_CRD.shape[1:])
            begin = tf.constant(0), dx, tf.zeros([] if packed else w_VD.shape)
            _, dx, dw_VD = tf.while_loop(lambda index, *_: index < count, one, begin, parallel_iterations=1)
            dx_RD = tf.reshape(dx.stack(), [-1, x_RD.shape[1]])[: tf.shape(x_RD)[0]]
            return [dx_RD, *(tf.cast(dw_VD, w.dtype) for w in plain)]

        return tf.reshape(loss_CR, [-1])[: tf.shape(x_RD)[0]], gradient

    loss_R = row_losses(x_RD) if packed else row_losses(x_RD, tf.convert_to_tensor(weight))
    losses = _weighted(tf.where(counted, tf.reshape(loss_R, tf.shape(labels)), 0), sample_weight)
    return tf.reduce_sum(losses), tf.math.count_nonzero(counted, dtype=tf.float32)


class Factors(NamedTuple):
    """What logits are made of, beside them as an attribute: from these `fit` takes the loss without them."""

    x_BTD: Tensor
    weight: Any
    rows: int


def _cut(rows: int, *arrays: Tensor) -> tuple[Tensor, ...]:
    """Arrays [R, ...] as chunks [C, rows, ...], the last one filled up with zeros."""
    after = -sizes(arrays[0])[0] % rows
    return tuple(
        tf.reshape(tf.pad(x, [[0, after], *[[0, 0]] * (len(x.shape) - 1)]), [-1, rows, *x.shape[1:]]) for x in arrays
    )


def _loss_and_log_sum(x_RD: Tensor, label_R: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row of x W^T, and log(sum(exp))."""
    logits = product(tf.cast(x_RD, tf.float32), w_VD)
    log_sum_R = tf.reduce_logsumexp(logits, -1)
    return log_sum_R - tf.gather(logits, label_R, batch_dims=1), log_sum_R


def _logits_gradient(x_RD: Tensor, label_R: Tensor, log_sum_R: Tensor, upstream_R: Tensor, w_VD: Tensor) -> Tensor:
    """The gradient of the logits x W^T of some rows: softmax, less 1 at the label."""
    softmax = tf.exp(product(x_RD, w_VD) - tf.expand_dims(log_sum_R, 1))
    place = tf.stack([tf.range(tf.shape(label_R)[0]), tf.cast(label_R, tf.int32)], axis=1)
    return tf.tensor_scatter_nd_sub(softmax, place, tf.ones_like(log_sum_R)) * tf.expand_dims(upstream_R, 1)


def _matmul(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """A product as a batch of one, which TensorFlow computes faster on a CPU."""
    return tf.squeeze(tf.matmul(tf.expand_dims(a, 0), tf.expand_dims(b, 0), **options), 0)


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


def label_log_probability(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Sums [B] of log softmax(logits)[label] over labels [B, T] of each row, each predicted by the column before."""
    return tf.reduce_sum(_log_probabilities(logits[:, :-1], labels[:, 1:], ignore), -1)


def preference_loss(
    policy_B: Tensor, reference_B: Tensor, counted_B: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log sigmoid(beta * margin) over pairs, their number, and of how many the margin is above 0.

    Formula: `mistral_core.reference.ops.preference_loss`.
    """
    chosen, rejected = tf.split(policy_B - reference_B, 2)
    margin, pairs = beta * (chosen - rejected), tf.split(counted_B, 2)[0]
    right = tf.reduce_sum(tf.cast(tf.logical_and(pairs, margin > 0), tf.int32))
    total = tf.reduce_sum(tf.where(pairs, tf.nn.softplus(-margin), 0.0))
    return total, tf.reduce_sum(tf.cast(pairs, tf.int32)), right


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
