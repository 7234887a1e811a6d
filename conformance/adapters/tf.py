"""mistral_tf behind NumPy."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mistral_core.devices import CPU
from mistral_core.errors import UnsupportedFeatureError

from .base import Adapter


class Recorder(keras.layers.Layer):
    """A module with another one inside, as users and libraries put it into a model; tells when it is called."""

    def __init__(self, module: Any, called: Any) -> None:
        super().__init__(autocast=False)
        self.inner, self.called = module, called
        self.built = True

    def call(self, *arguments: Any, **options: Any) -> Any:
        self.called()
        return self.inner(*arguments, **options)

    @property
    def weight(self) -> Any:
        return self.inner.weight

    @property
    def bias(self) -> Any:
        return self.inner.bias


class BackendAdapter(Adapter):
    name = "tf"

    def device_named(self, name: str) -> Any:
        """None: TensorFlow itself chooses; raises UnsupportedFeatureError where any other than the CPU is named."""
        if name != CPU:
            raise UnsupportedFeatureError(f"device must be {CPU!r} where TensorFlow is compared, got {name!r}.")

    def array(self, value: Any, dtype: str | None = None) -> Any:
        array = np.asarray(value)
        if dtype:
            return tf.cast(array, dtype)
        return tf.cast(array, tf.int32) if array.dtype == np.int64 else tf.convert_to_tensor(array)

    def numpy(self, array: Any) -> Any:
        return tf.convert_to_tensor(array).numpy()

    def model(self, architecture: str, config: Any, parameters: Any, dtype: str, implementation: str) -> Any:
        kind = getattr(self.package, architecture)
        model = kind(config, attn_implementation=implementation, dtype=dtype, initializer="zeros")
        return model.load_arrays({name: np.asarray(array).astype(dtype) for name, array in parameters.items()})

    def loss_and_gradients(self, model: Any, inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = model(**inputs).loss
        names = [name for name, _ in model.named_arrays()]
        variables = [model._parameter(name).value for name in names]
        gradients = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        return self.numpy(loss), {
            name: self.numpy(tf.convert_to_tensor(g)) for name, g in zip(names, gradients, strict=True)
        }

    def layer(self, model: Any, index: int) -> Any:
        return model.model.decoder_layers[index]

    def recorder(self, module: Any, called: Any) -> Any:
        return Recorder(module, called)
