"""A model that learns, as `mistral_core.training` asks for it: a guest, of which the model does not know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.training.learner import MOMENTS, Measure, StepOutcome, check_arrays, check_learns, rows_of_logits
from mistral_core.training.settings import TrainingSettings
from mistral_core.validate import IGNORE

from .arrays import to_numpy
from .checkpointing import drawn_from
from .lora import disable_adapter, save_adapter, trained_adapters
from .losses import divided, label_log_probability, preference_loss
from .optimizers import AdamW
from .quantize import QuantizedLinear


class Learner:
    """A model and AdamW of those of its weights that learn: of an adapter where it has one that trains, else all.

    What learns is float32: of a bfloat16 model copies, to which its own weights are rounded after each step. With
    `objective="preferences"` the batches are pairs, and the model without its adapter is what it is compared with (DPO,
    arXiv 2305.18290). Raises ConfigError, UnsupportedFeatureError.
    """

    def __init__(self, model: keras.Model, settings: TrainingSettings, *, objective: str = "labels") -> None:
        self.model, self.settings, self.objective = model, settings, objective
        self._weights = {each.name: each for each in model.trainable_variables}
        self._adapters = trained_adapters(model)
        packed = any(isinstance(part, QuantizedLinear) for part in model._flatten_layers())
        dtype = keras.backend.standardize_dtype(model.compute_dtype)
        check_learns(model, self._weights, self._adapters, dtype=dtype, packed=packed, objective=objective)
        self._wide = {
            name: each if each.dtype == "float32" else keras.Variable(to_numpy(each).astype(np.float32), name=name)
            for name, each in self._weights.items()
        }
        wide = list(self._wide.values())
        self._optimizer = AdamW(
            settings.rate, beta_1=settings.b1, beta_2=settings.b2, epsilon=settings.eps,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self._optimizer.exclude_from_weight_decay(var_list=[each for each in wide if len(each.shape) < 2])
        self._optimizer.build(wide)
        self._gradients, self._measured, self._moved = (
            tf.function(each, autograph=False) for each in (self._gradients_of, self._measured_of, self._moved_by)
        )

    def step(self, batches: Sequence[Mapping[str, np.ndarray]], *, items: int, rate: float, number: int) -> StepOutcome:
        """Learn from the batches as from one; where a loss or the gradients are no finite numbers, nothing is moved."""
        losses, right, gradients = [], [], None
        words = np.random.SeedSequence([self.settings.seed, number])
        for batch, seed in zip(batches, words.generate_state(2 * len(batches)).reshape(-1, 2), strict=True):
            loss, wins, of_batch = self._gradients(
                _arrays(batch), tf.constant(items, tf.float32), tf.constant(seed.view(np.int32))
            )
            gradients = of_batch if gradients is None else [a + b for a, b in zip(gradients, of_batch, strict=True)]
            losses.append(loss)
            right.append(wins)
        won = None if self.objective == "labels" else sum(int(wins) for wins in right)
        outcome = StepOutcome(tuple(map(float, losses)), float(tf.linalg.global_norm(gradients)), won)
        if outcome.is_finite:
            factor = self.settings.factor(outcome.norm)
            self._optimizer.learning_rate = rate
            self._moved(gradients, tf.constant(factor, tf.float32))
        return outcome

    def measure(self, batch: Mapping[str, np.ndarray]) -> Measure:
        """The loss of a batch, and nothing learnt."""
        total, right = self._measured(_arrays(batch))
        is_told = self.objective == "preferences" or self.model.architecture != "MistralForCausalLM"
        return Measure(float(total), int(right) if is_told else None)

    def arrays(self) -> dict[str, np.ndarray]:
        """Each of MOMENTS of each weight that learns, "weights.model.norm.weight" and so on, float32."""
        return {
            f"{moment}.{name}": to_numpy(variable)
            for name in self._wide
            for moment, variable in zip(MOMENTS, self._kept(name), strict=True)
        }

    def restore(self, arrays: Mapping[str, np.ndarray], *, steps: int) -> None:
        """Go on after so many steps from what `arrays` gave; raises MissingTensorsError, ShapeMismatchError."""
        check_arrays(arrays, {name: tuple(wide.shape) for name, wide in self._wide.items()})
        for name in self._wide:
            for moment, variable in zip(MOMENTS, self._kept(name), strict=True):
                variable.assign(arrays[f"{moment}.{name}"])
        self._optimizer.iterations.assign(steps)
        self._put_back()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter that learns in peft's files, or the whole model."""
        if self._adapters:
            save_adapter(self.model, directory, name=self._adapters[0])
        else:
            self.model.save_pretrained(directory)

    def _kept(self, name: str) -> tuple[keras.Variable, keras.Variable, keras.Variable]:
        wide = self._wide[name]
        index = self._optimizer._get_variable_index(wide)
        return wide, self._optimizer._momentums[index], self._optimizer._velocities[index]

    def _put_back(self) -> None:
        """Let the model have the weights that were moved."""
        for name, wide in self._wide.items():
            if self._weights[name] is not wide:
                self._weights[name].assign(tf.cast(wide, self._weights[name].dtype))

    def _gradients_of(self, batch: Mapping[str, Tensor], items: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Any]:
        """The loss of a batch, how many pairs are right, and gradients in float32."""
        variables = [each.value for each in self._weights.values()]
        with tf.GradientTape() as tape, drawn_from(seed):
            if self.objective == "preferences":
                total, count, right = self._preferences(batch, training=True)
                loss = divided(total, count, items)
            else:
                loss, right = self.model(**batch, num_items_in_batch=items, use_cache=False, training=True).loss, 0
        found = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return loss, tf.convert_to_tensor(right), [tf.cast(tf.convert_to_tensor(each), tf.float32) for each in found]

    def _measured_of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The sum of a batch's losses, and how much of it is right."""
        if self.objective == "preferences":
            total, _, right = self._preferences(batch, training=False)
            return total, right
        options = rows_of_logits(self.model, batch)
        out = self.model(**batch, num_items_in_batch=1, use_cache=False, training=False, **options)
        if self.model.architecture == "MistralForCausalLM":
            return out.loss, tf.constant(0)
        labels = batch["labels"]
        right = tf.logical_and(tf.argmax(out.logits, -1, labels.dtype) == labels, labels != IGNORE)
        return out.loss, tf.reduce_sum(tf.cast(right, tf.int32))

    def _preferences(self, batch: Mapping[str, Tensor], *, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the losses of pairs, their number, and how many are right."""
        labels, arrays = batch["labels"], {name: array for name, array in batch.items() if name != "labels"}
        with disable_adapter(self.model):
            before = self.model(**arrays, use_cache=False, training=False).logits
        after = self.model(**arrays, use_cache=False, training=training).logits
        policy, reference = label_log_probability(after, labels), label_log_probability(before, labels)
        counted = tf.reduce_any(labels != IGNORE, -1)
        return preference_loss(policy, tf.stop_gradient(reference), counted, beta=self.settings.beta)

    def _moved_by(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        self._optimizer.apply([each * factor for each in gradients], list(self._wide.values()))
        self._put_back()


def _arrays(batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: tf.constant(array, tf.int32) for name, array in batch.items()}
