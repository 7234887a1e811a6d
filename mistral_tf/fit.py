"""What Keras does with a finished model: call, compile, fit, evaluate, predict.

Models answer with named tuples, and `fit` takes what users of Keras and of transformers have: a dictionary with the
labels in it, (x, y) or (x, y, sample_weight), where x may be a dictionary. Without a `loss` it is the model's own (a
language model's labels are then the tokens themselves); losses and metrics given by name get logits. Labels of -100
count in none of them.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import outputs
from mistral_core.errors import InputError, MistralError

from .losses import (
    ALIASES,
    IGNORED,
    LOSSES,
    METRICS,
    Factors,
    chunked_cross_entropy,
    classification_loss,
    cross_entropy,
    divided,
)
from .saving import SavedModel
from .strategies import check_strategy, logs_of_replica, rows_of_replica, shared, told
from .traces import changed, refuse_distribution

OUTPUTS: dict[str, tuple[type[tuple[Any, ...]], tuple[str, ...]]] = {
    "MistralModel": (outputs.ModelOutput, ("last_hidden_state",)),
    "MistralForCausalLM": (outputs.CausalLMOutput, ("logits",)),
    "MistralForSequenceClassification": (outputs.SequenceClassifierOutput, ("logits",)),
    "MistralForTokenClassification": (outputs.TokenClassifierOutput, ("logits",)),
    "MistralForQuestionAnswering": (outputs.QuestionAnsweringOutput, ("start_logits", "end_logits")),
}
"""Class -> its output and the fields of it that losses and metrics are about."""

LABELS = {"labels": "logits", "start_positions": "start_logits", "end_positions": "end_logits"}
"""Argument of a call -> the field of the output that it is about."""

# so Keras leaves our errors what they are: it would make new ones of them, with its arguments and bold type around
MistralError._keras_call_info_injected = True


class KerasModel(SavedModel):
    """A Keras model whose weights exist at once, whose inputs keep their dtypes and whose output is a named tuple."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keras.saving.register_keras_serializable("mistral_tf")(cls)

    def __init__(self, *, dtype: keras.DTypePolicy, name: str | None) -> None:
        refuse_distribution()
        super().__init__(dtype=dtype, autocast=False, name=name)
        self.built = True

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Call with lists, NumPy arrays or tensors, or one list or dictionary of them; Keras takes no lists."""
        refuse_distribution()
        if arrays and _several(arrays[0]):
            arrays = (*arrays[0], *arrays[1:])
        given = dict(**inspect.signature(self.call).bind_partial(*arrays).arguments, **options)
        if isinstance(given.get("input_ids"), Mapping):
            given = {**given, "input_ids": None, **given["input_ids"]}
        if any(isinstance(value, keras.KerasTensor) for value in given.values()):
            return self._symbolic(given)
        return super().__call__(**given)

    def _symbolic(self, given: dict[str, Any]) -> Any:
        """The output for symbolic tensors: nodes of Keras' graph hold no None, so a plain tuple goes through it."""
        given = {name: value for name, value in given.items() if value is not None}
        values = iter(super().__call__(**{**given, "use_cache": False, "return_dict": False}))
        config, (kind, main) = self.config, self._outputs
        there = {
            **dict.fromkeys(main, True),
            "loss": all(name in given for name, field in LABELS.items() if field in main),
            "hidden_states": given.get("output_hidden_states", config.output_hidden_states),
            "attentions": given.get("output_attentions", config.output_attentions),
        }
        output = kind(**{name: next(values) if there.get(name) else None for name in kind._fields})
        return self.as_tuple_if_asked(output, given.get("return_dict"))

    @property
    def _outputs(self) -> Any:
        return OUTPUTS[self.architecture]

    # Training

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        *,
        metrics: Any = None,
        weighted_metrics: Any = None,
        jit_compile: bool | str = False,
        **options: Any,
    ) -> None:
        """keras.Model.compile, where `loss=None` is the model's own; XLA, which compiles for every length, is off."""
        self._own_loss = loss is None
        with self.distribute_strategy.scope():
            super().compile(
                optimizer,
                None if loss is None else self._by_field(loss, functools.partial(_named, LOSSES)),
                metrics=self._metrics_of_logits(metrics),
                weighted_metrics=self._metrics_of_logits(weighted_metrics),
                jit_compile=jit_compile,
                **options,
            )
        check_strategy(self)

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `compile_from_config` takes; None where the model is not compiled."""
        config = super().get_compile_config()
        return config and {**config, "optimizer_built": self.optimizer.built}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was; an optimizer that has seen no gradients yet has nothing to load."""
        config = dict(config)
        built = config.pop("optimizer_built", True)
        self._own_loss = config.get("loss") is None
        super().compile(**keras.saving.deserialize_keras_object(config))
        check_strategy(self)
        if built:
            self.optimizer.build(self.trainable_variables)

    def _by_field(self, chosen: Any, made: Callable[[Any], Any]) -> Any:
        """A loss or metrics as `made` makes each, by the fields that they are about if the class has several."""
        main = self._outputs[1]
        each = chosen if isinstance(chosen, Mapping) else dict.fromkeys(main, chosen)
        each = {
            name: [made(one) for one in some] if isinstance(some, list | tuple) else made(some)
            for name, some in each.items()
        }
        return each[main[0]] if (main[0],) == main == tuple(each) else each

    def _metrics_of_logits(self, metrics: Any) -> Any:
        """Metrics, those by name made for logits."""
        row_scores = self.architecture == "MistralForSequenceClassification"
        binary = row_scores and self.config.problem(float_labels=False) != "single_label_classification"

        def made(metric: Any) -> Any:
            if binary and metric in ("accuracy", "acc"):
                return keras.metrics.BinaryAccuracy(name=metric, threshold=0.0)
            if metric in ("crossentropy", "ce"):
                metric = "binary_crossentropy" if binary else "sparse_categorical_crossentropy"
            if isinstance(metric, keras.metrics.Metric) and len(self._outputs[1]) > 1:
                return metric.from_config(metric.get_config())  # a state for each field
            return _named(METRICS, metric)

        if isinstance(metrics, Mapping):
            metrics = {name: some if isinstance(some, list | tuple) else [some] for name, some in metrics.items()}
        return None if metrics is None else self._by_field(metrics, made)

    def fit(self, x: Any = None, *arguments: Any, **options: Any) -> Any:
        """keras.Model.fit, of a tokenizer's output too, which Keras does not know for a dictionary.

        An optimizer's `gradient_accumulation_steps` is Keras' own: the mean of the batches' means, in which a batch of
        few labels weighs as much as one of many. For the mean over all labels write the loop: the gradients of
        `model(ids, labels=labels, num_items_in_batch=n).loss` of each batch add up, n the labels of all of them.
        """
        options = {name: _plain(value) if name == "validation_data" else value for name, value in options.items()}
        return super().fit(_plain(x), *arguments, **options)

    def evaluate(self, x: Any = None, *arguments: Any, **options: Any) -> Any:
        """keras.Model.evaluate, of a tokenizer's output too."""
        return super().evaluate(_plain(x), *arguments, **options)

    def train_on_batch(self, x: Any, *arguments: Any, **options: Any) -> Any:
        """keras.Model.train_on_batch, of a tokenizer's output too."""
        return super().train_on_batch(_plain(x), *arguments, **options)

    def test_on_batch(self, x: Any, *arguments: Any, **options: Any) -> Any:
        """keras.Model.test_on_batch, of a tokenizer's output too."""
        return super().test_on_batch(_plain(x), *arguments, **options)

    def make_train_function(self, force: bool = False) -> Any:
        """The traced step of `fit`, of the model as it is."""
        check_strategy(self)
        if self.optimizer is not None and not self.optimizer.built:  # variables made in a trace have it made twice
            self.optimizer.build(self.trainable_variables)
        return super().make_train_function(changed(self, "train") or force)

    def make_test_function(self, force: bool = False) -> Any:
        """The traced step of `evaluate`, of the model as it is."""
        check_strategy(self)
        return super().make_test_function(changed(self, "test") or force)

    def make_predict_function(self, force: bool = False) -> Any:
        """The traced step of `predict`, of the model as it is."""
        return super().make_predict_function(changed(self, "predict") or force)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step of `fit`."""
        return logs_of_replica(self, super().train_step(self._unpacked(data)))

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`."""
        return logs_of_replica(self, super().test_step(self._unpacked(data)))

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """What Keras does before the first step under a strategy, of one replica's rows.

        Keras takes the mean of the replicas' rows, which must then be as many on each, and of several workers none.
        """
        strategy = self._distribute_strategy
        if strategy is None:
            return
        if iterator is not None:
            data_batch = rows_of_replica(strategy, next(iter(iterator))[-1])
        with strategy.scope():
            self._symbolic_build(data_batch=self._unpacked(data_batch))

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        """x, y and sample weights, y as an array or, where the model answers with several, by their names."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        main = self._outputs[1]
        if isinstance(x, Mapping) and y is None:
            y = {name: value for name, value in x.items() if name in LABELS}
            x = {name: value for name, value in x.items() if name not in LABELS}
        if isinstance(y, tuple | list) and len(main) > 1:
            y = dict(zip(main, y, strict=True))
        if isinstance(y, Mapping):
            y, weight = _by_output(y, main), _by_output(weight, main)
        if y is None or (isinstance(y, Mapping) and set(y) != set(main)):
            expected = " and ".join(name for name, field in LABELS.items() if field in main) or "y"
            raise InputError(f"fit and evaluate: no labels; give {expected} in the dictionary, or (x, y).")
        if self._own_loss and self.architecture == "MistralModel":
            raise InputError("MistralModel has no loss of its own; give compile a loss, or train a class with a head.")
        return x, y, weight

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        """The loss asked for by `compile`; the model's own is a mean, with weights of their product with each loss.

        Over the rows of all replicas: each one's gradients are of its part, and each tells the whole.
        """
        y, scores, sample_weight = self._pairs(y, y_pred, sample_weight)
        if not self._own_loss:
            weights = shared(self.loss, y, sample_weight)
            return told(tf.reduce_sum(super().compute_loss(x, y, scores, weights, training)))
        if isinstance(y, dict):
            weights = sample_weight if isinstance(sample_weight, dict) else dict.fromkeys(y, sample_weight)
            sums = [self._own_sum(y[name], scores[name], weights[name]) for name in y]
        elif (factors := getattr(y_pred["logits"], "_factors", None)) is not None:
            sums = [_sum_of_chunks(y, factors, sample_weight)]
        else:
            sums = [self._own_sum(y, scores, sample_weight)]
        own = told(divided(*map(tf.stack, zip(*sums, strict=True))))
        return tf.add_n([own, *map(self._aggregate_additional_loss, self.losses)])

    def _own_sum(self, y: Tensor, scores: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.architecture == "MistralForSequenceClassification":
            return classification_loss(self.config, scores, y, sample_weight=weight)
        return cross_entropy(scores, tf.reshape(tf.cast(y, tf.int32), tf.shape(scores)[:-1]), sample_weight=weight)

    def _problem(self, y: Tensor) -> str:
        """What the own loss takes labels for."""
        if self.architecture == "MistralForSequenceClassification":
            return self.config.problem(float_labels=y.dtype.is_floating)
        return "single_label_classification"

    def _check_labels(self, y: Tensor, scores: Tensor) -> None:
        expected = scores.shape[:-1] if self._problem(y) == "single_label_classification" else scores.shape
        if not _trimmed(y.shape).is_compatible_with(_trimmed(expected)):
            raise InputError(f"labels must have the shape {list(expected)}, got {tuple(y.shape)}.")

    def _pairs(self, y: Any, output: Any, weight: Any) -> tuple[Any, Any, Any]:
        """Labels, scores and weights side by side, as the loss in force compares them."""
        main = self._outputs[1]
        if len(main) == 1:
            y, scores = tf.convert_to_tensor(y), output[main[0]]
            if self._own_loss:
                self._check_labels(y, scores)
                if self.architecture == "MistralForCausalLM":
                    y, scores = y[:, 1:], scores[:, :-1]
            if weight is not None and y.shape.rank == 2 and not y.dtype.is_floating:
                # of rows [B] as [B, 1], of tokens [B, T] as those of the labels; Keras may not know the rank
                weight = tf.reshape(weight, [tf.shape(weight)[0], -1])[:, -tf.shape(y)[1] :]
            return y, scores, weight
        length = tf.shape(output[main[0]])[1]
        y = {name: tf.reshape(tf.cast(y[name], tf.int32), [-1]) for name in main}
        inside = {name: tf.where(value < length, tf.maximum(value, 0), IGNORED) for name, value in y.items()}
        return inside, {name: output[name] for name in main}, weight

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """The metrics asked for by `compile`, of what the loss compares."""
        y, scores, sample_weight = self._pairs(y, y_pred, sample_weight)
        if isinstance(y, dict):
            pairs = {name: _counted(y[name], scores[name]) for name in y}
            y, scores = ({name: pair[index] for name, pair in pairs.items()} for index in (0, 1))
        else:
            y, scores = _counted(y, scores)
        return super().compute_metrics(x, y, scores, sample_weight)

    # Inference

    def predict_step(self, data: Any) -> dict[str, Any]:
        """One step of `predict`: the fields that are there, without the cache."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, Mapping):
            x = {name: value for name, value in x.items() if name not in LABELS}
        output = self(x, training=False)
        return {
            name: value for name, value in output._asdict().items() if value is not None and name != "past_key_values"
        }

    def predict(self, x: Any, *arguments: Any, **options: Any) -> Any:
        """The model's output, as NumPy arrays, for all batches of x."""
        return self._outputs[0](**super().predict(_plain(x), *arguments, **options))

    def predict_on_batch(self, x: Any) -> Any:
        """The model's output, as NumPy arrays, for one batch."""
        return self._outputs[0](**super().predict_on_batch(_plain(x)))


def _sum_of_chunks(y: Tensor, factors: Factors, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The own loss of a language model from labels [B, T - 1] of the next tokens, without logits."""
    after = [[0, 0], [0, 1]]
    y = tf.cast(y, tf.int32)
    if weight is not None:
        weight = tf.pad(tf.broadcast_to(weight, tf.shape(y)), after)
    y = tf.pad(y, after, constant_values=IGNORED)
    return chunked_cross_entropy(factors.x_BTD, factors.weight, y, rows=factors.rows, sample_weight=weight)


def _counted(y: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and scores for metrics, which skip what Keras' mask says."""
    if y.dtype.is_floating:
        return y, scores
    scores = tf.identity(scores)
    scores._keras_mask = y != IGNORED
    return tf.maximum(y, 0), scores


def _named(table: Mapping[str, Callable[[], Any]], chosen: Any) -> Any:
    """What a table has under a name, in any of Keras' spellings; anything else as it is."""
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", chosen).lower() if isinstance(chosen, str) else ""
    name = ALIASES.get(name, name)
    return table[name]() if name in table else chosen


def _by_output(given: Any, main: tuple[str, ...]) -> Any:
    """Labels by name as those of outputs, one as itself; weights too, to which Keras gives the labels' names."""
    if not isinstance(given, Mapping):
        return given
    named = {LABELS.get(name, name): value for name, value in given.items()}
    return named if len(main) > 1 else named.get(main[0])


def _several(value: Any) -> bool:
    """Whether a first argument is a list of arguments, and not a batch written as a list of rows."""
    return isinstance(value, list | tuple) and bool(value) and len(getattr(value[0], "shape", ())) > 1


def _trimmed(shape: tf.TensorShape) -> tf.TensorShape:
    """A shape without its last axis of one."""
    return shape[:-1] if (shape.rank or 0) > 1 and shape[-1] == 1 else shape


def _plain(x: Any) -> Any:
    """Dictionaries of another kind as those that Keras knows, inside tuples too."""
    if isinstance(x, tuple):
        return tuple(_plain(each) for each in x)
    return dict(x) if isinstance(x, Mapping) else x
