"""Models made under a strategy of tf.distribute: a guest of which layers.py and model.py know nothing."""

from __future__ import annotations

from typing import Any, Self

import tensorflow as tf
from tensorflow import Tensor

from mistral_core.errors import ConfigError, ConversionError, UnsupportedFeatureError

from .losses import IGNORED, over_replicas

MIRRORED = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
MEANS = ("sum_over_batch_size", "mean")
"""Reductions of Keras' losses that divide by how many losses there are."""


def check_strategy(model: Any) -> None:
    """Raise ConfigError for what makes Keras' training of several replicas fail obscurely, or count twice.

    It is UnsupportedFeatureError where no other way to make the model would help.
    """
    strategy = model.distribute_strategy
    if not isinstance(strategy, MIRRORED) or strategy.num_replicas_in_sync == 1:
        return
    if model.jit_compile:
        raise UnsupportedFeatureError(
            "compile: jit_compile must be False with several replicas, whose variables XLA does not find on one device."
        )
    if model.steps_per_execution > 1:
        raise UnsupportedFeatureError(
            f"compile: steps_per_execution must be 1 with several replicas, got {model.steps_per_execution}: Keras' "
            "loop of steps does not run on them."
        )
    for what in ("model", "optimizer"):
        variables = getattr(model if what == "model" else model.optimizer, "variables", ())
        if not all(strategy.extended.variable_created_in_scope(variable.value) for variable in variables):
            raise ConfigError(
                f"{type(strategy).__name__}: the {what} must be made under its scope, and was not; make model and "
                "optimizer in `with strategy.scope():`."
            )


def shared(loss: Any, y: Any, weight: Any) -> Any:
    """Weights of labels with which the means that Keras takes on each replica add up to the mean over all labels.

    Keras divides by what a replica has, then by the number of replicas. Loss, labels and weights may be dictionaries
    of outputs. A loss that is no such mean keeps its weights.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if replicas == 1:
        return weight
    if isinstance(y, dict):
        given = {name: [each.get(name) if isinstance(each, dict) else each for each in (loss, weight)] for name in y}
        return {name: shared(its_loss, y[name], its_weight) for name, (its_loss, its_weight) in given.items()}
    if getattr(loss, "reduction", MEANS[0]) not in MEANS:
        return weight
    if y.dtype.is_floating:
        counted_B = tf.ones(tf.shape(y)[: max(len(y.shape) - 1, 1)])
    else:
        counted_B = tf.cast(y != IGNORED, tf.float32)
    count = tf.reduce_sum(counted_B)
    share = replicas * tf.math.divide_no_nan(count, over_replicas(count))
    return share * (tf.ones_like(counted_B) if weight is None else tf.cast(weight, tf.float32))


def told(part: Tensor) -> Tensor:
    """A replica's part of a loss, with the gradients of that part and the value that Keras reports as the whole.

    Keras takes the mean of what the replicas tell, weighted by their rows.
    """
    whole = over_replicas(part) / tf.distribute.get_strategy().num_replicas_in_sync
    return part + tf.stop_gradient(whole - part)


def rows_of_replica(strategy: tf.distribute.Strategy, batches: Any) -> Any:
    """The first replica's rows here of the next batch that a strategy distributes."""
    return tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))


def logs_of_replica(model: Any, logs: dict[str, Any]) -> dict[str, Any]:
    """A replica's metrics as Keras takes their mean over workers: along a first axis, which numbers are given."""
    return logs if Workers.of(model) is None else {name: value[None] for name, value in logs.items()}


class Workers:
    """The processes of a MultiWorkerMirroredStrategy, each of which holds the whole of a model."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """Those of the strategy that a model was made under; None where one process has all replicas."""
        strategy = model.distribute_strategy
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return None
        has_all = strategy.num_replicas_in_sync == len(strategy.extended.worker_devices)
        return None if has_all else cls(strategy)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes: the chief."""
        return bool(self._strategy.extended.should_checkpoint)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any of them; each waits here for all of them.

        Raises ConversionError where another one is gone, as TensorFlow's heartbeats tell after some seconds.
        """
        try:
            flags = self._strategy.run(lambda: tf.constant(int(flag)))
            return bool(self._strategy.reduce("SUM", flags, None) > 0)
        except tf.errors.OpError as error:
            raise ConversionError(
                "save: another worker is gone; what is on disk is whole, the old or the new. Start the workers again."
            ) from error
