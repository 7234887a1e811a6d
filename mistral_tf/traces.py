"""What functions are traced of: tf.function knows sizes or not, and keeps a model's numbers and parts as they were."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from mistral_core.errors import UnsupportedFeatureError

_traced: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, list[Any]]]] = weakref.WeakKeyDictionary()
_portable = ContextVar("portable", default=False)


def sizes(array: Tensor) -> list[Any]:
    """The size of each axis: an integer where it is known, which costs no operation, else a tensor."""
    known = array.shape.as_list()
    if None not in known:
        return known
    return [found if size is None else size for size, found in zip(known, tf.unstack(tf.shape(array)), strict=True)]


@contextlib.contextmanager
def portable(asked: bool = True) -> Iterator[None]:
    """A context in which programs are of TensorFlow's own operations: to be saved."""
    before = _portable.set(_portable.get() or asked)
    try:
        yield
    finally:
        _portable.reset(before)


def is_portable() -> bool:
    """Whether what is traced now is of TensorFlow's own operations alone: to be saved, or compiled by XLA."""
    if _portable.get():
        return True
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def refuse_distribution() -> None:
    """Raise UnsupportedFeatureError where a `keras.distribution` is set, which does nothing on TensorFlow."""
    found = keras.distribution.distribution()
    if found is not None:
        raise UnsupportedFeatureError(
            f"keras.distribution.{type(found).__name__} is set, and does not work on TensorFlow; for data over devices "
            "make the model under tf.distribute.MirroredStrategy().scope(), for a model over devices load the same "
            "checkpoint in mistral_flax or mistral_torch. keras.distribution.set_distribution(None) takes it back."
        )


def changed(model: Any, function: str) -> bool:
    """Whether a model has other layers or variables than when last asked for a function's sake, or another config.

    Of the config only what a program depends on counts; of layers, how packed ones round what they multiply, which
    adapters they add, and what their classes call.
    Raises UnsupportedFeatureError where a `keras.distribution` is set, of which what is traced would say nothing.
    """
    refuse_distribution()
    layers = [*model._flatten_layers(include_self=False)]
    settings = model.config.program(model.architecture), [_settings(layer) for layer in layers]
    now = settings, [*model.weights, *layers]
    before, parts = _traced.setdefault(model, {}).get(function, now)
    _traced[model][function] = now
    return before != settings or [*map(id, parts)] != [*map(id, now[1])]


def _settings(layer: Any) -> tuple[Any, ...]:
    return getattr(layer, "activations", None), getattr(layer, "adds", None), layer.trainable, type(layer).call
