"""AdamW as PyTorch and optax compute it, for a training that is the same in the three frameworks."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops


@keras.saving.register_keras_serializable("mistral_tf")
class AdamW(keras.optimizers.AdamW):
    """Adam whose epsilon is added after the moments are corrected: the formula of `mistral_core.reference.optim`.

    Keras adds it before, which makes it 1 / sqrt(1 - beta_2^t) times as large: 32 times in the first step.
    """

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        """Gradients as they are clipped; of an embedding, whose rows come one by one, first as what they add up to.

        The norm of the rows by themselves is not that of the gradient where a token is there twice.
        """
        return super()._clip_gradients([each if each is None else tf.convert_to_tensor(each) for each in grads])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move a variable by its gradient."""
        index, step = self._get_variable_index(variable), ops.cast(self.iterations + 1, variable.dtype)
        rate = ops.cast(learning_rate, variable.dtype)
        # of an embedding come the rows of its tokens, a token's as often as it is there: their sum is the gradient
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        first, second = self._momentums[index], self._velocities[index]
        self.assign_add(first, (gradient - first) * (1 - self.beta_1))
        self.assign_add(second, (ops.square(gradient) - second) * (1 - self.beta_2))
        mean = first / (1 - ops.power(ops.cast(self.beta_1, variable.dtype), step))
        spread = ops.sqrt(second / (1 - ops.power(ops.cast(self.beta_2, variable.dtype), step)))
        self.assign_sub(variable, rate * mean / (spread + self.epsilon))
