"""mistral_flax behind NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .base import Adapter


class Recorder(nnx.Module):
    """A module with another one inside, as users and libraries put it into a model; tells when it is called."""

    def __init__(self, module: Any, called: Any) -> None:
        super().__init__()
        self.inner, self.called = module, called

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.called()
        return self.inner(*arguments, **options)

    @property
    def weight(self) -> Any:
        return self.inner.weight

    @property
    def bias(self) -> Any:
        return self.inner.bias

    @property
    def dtype(self) -> Any:
        return self.inner.dtype


def first_device() -> Any:
    """Where JAX puts arrays."""
    return jax.devices()[0]


class BackendAdapter(Adapter):
    name = "flax"

    def device_named(self, name: str) -> Any:
        """None where JAX puts arrays there by itself: as for users, they are then bound to no device."""
        found = super().device_named(name)
        return None if found == first_device() else found

    def array(self, value: Any, dtype: str | None = None) -> Any:
        return jax.device_put(jnp.asarray(np.asarray(value), dtype), self.device)

    def numpy(self, array: Any) -> Any:
        return np.asarray(array)

    def model(self, architecture: str, config: Any, parameters: Any, dtype: str, implementation: str) -> Any:
        kind = getattr(self.package, architecture)
        model = kind(config, attn_implementation=implementation, dtype=dtype)
        for name, array in parameters.items():
            model.set_parameter(name, np.asarray(array).astype(dtype), device=self.device)
        model.tie_weights()
        return model

    def loss_and_gradients(self, model: Any, inputs: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda params: model(**inputs, params=params).loss)(model.params)
        return self.numpy(loss), {name: self.numpy(g) for name, g in gradients.items()}

    def forget_compiled(self) -> None:
        jax.clear_caches()

    def layer(self, model: Any, index: int) -> Any:
        return model.model.layers[str(index)]

    def recorder(self, module: Any, called: Any) -> Any:
        return Recorder(module, called)
