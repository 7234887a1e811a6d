"""What a model with an adapter (LoRA) learns of a batch: the gradients of all that trains, got as a user gets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_core.arrays import Array

from .base import Adapter


def loss_and_gradients(adapter: Adapter, model: Any, inputs: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
    """The loss of a call, and the gradients of all that trains, by the names of `reference.adapters.numbers`."""
    loss, found = {"torch": _torch, "flax": _flax, "tf": _tf}[adapter.name](model, inputs)
    return adapter.numpy(loss), {_named(path): adapter.numpy(gradient) for path, gradient in found.items()}


def _named(path: str) -> str:
    """A path's name: of an adapter's own tensors and of parts saved whole; what else trains keeps its path."""
    module, low, field = path.partition(".lora.default.")
    if low:
        return f"{module}.weight.{field}"
    return path.replace(".saved.default.", ".")


def _torch(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    loss = model(**inputs).loss
    loss.backward()
    return loss, {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def _flax(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from flax import nnx

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, state = nnx.jit(nnx.value_and_grad(lambda model: model(**inputs).loss, argnums=wrt))(model)
    return loss, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _tf(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = model(**inputs).loss
    gradients = tape.gradient(loss, model.trainable_variables)
    paths = [variable.path.rpartition("/")[2] for variable in model.trainable_variables]
    return loss, {path: tf.convert_to_tensor(each) for path, each in zip(paths, gradients, strict=True)}
