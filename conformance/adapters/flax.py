"""mistral_flax behind NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .base import Adapter


class BackendAdapter(Adapter):
    name = "flax"

    def array(self, value: Any, dtype: str | None = None) -> Any:
        return jnp.asarray(np.asarray(value), dtype)

    def numpy(self, array: Any) -> Any:
        return np.asarray(array)

    def model(self, architecture: str, config: Any, parameters: Any, dtype: str, implementation: str) -> Any:
        kind = getattr(self.package, architecture)
        model = kind(config, attn_implementation=implementation, dtype=dtype)
        return model.load_arrays({name: np.asarray(array).astype(dtype) for name, array in parameters.items()})

    def loss_and_gradients(self, model: Any, inputs: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda params: model(**inputs, params=params).loss)(model.params)
        return self.numpy(loss), {name: self.numpy(g) for name, g in gradients.items()}

    def layer(self, model: Any, index: int) -> Any:
        return model.model.layers[str(index)]
