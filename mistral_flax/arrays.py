"""Between NumPy and JAX, and what a user may pass as a model's input."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mistral_core import MistralConfig, devices, validate
from mistral_core.errors import ConfigError, InputError
from mistral_core.plain import dtype_name

from .cache import KVCache
from .processes import gathered, is_here

DTYPES = {
    "float64": jnp.float64,
    "float32": jnp.float32,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
}


def as_dtype(dtype: Any) -> Any:
    """A JAX dtype from itself, its name, or any framework's; raises ConfigError for one no model can have."""
    name = str(dtype_name(dtype))
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[name]


def as_dtypes(dtype: Any, param_dtype: Any) -> tuple[Any, Any]:
    """The dtypes of computation and parameters; without one for parameters, both are the same."""
    return as_dtype(dtype), as_dtype(dtype if param_dtype is None else param_dtype)


def as_device(device: Any) -> Any:
    """A JAX device from itself, its name, a number (-1 is the CPU); a Sharding as it is; "auto" is JAX's default.

    Raises ConfigError for a device that is not here.
    """
    if device is None or isinstance(device, jax.Device | jax.sharding.Sharding):
        return device
    if isinstance(device, str) and device == "auto":
        return None
    return devices.find(device, _devices(), framework="JAX")


def _devices() -> dict[str, list[Any]]:
    """What is here, by kind; the CPU is there beside any accelerator, but where JAX was told otherwise."""
    here: dict[str, list[Any]] = {}
    for device in jax.devices():
        kind = device.platform
        here.setdefault(devices.NAMES.get(kind, kind), []).append(device)
    if devices.CPU not in here:
        with contextlib.suppress(RuntimeError):
            here[devices.CPU] = jax.devices("cpu")
    return here


def to_numpy(array: Array) -> np.ndarray:
    """An array as NumPy, bits kept; bfloat16 is ml_dtypes' in both. Other processes give the parts that they hold."""
    return gathered(array)


def memory(array: Array) -> np.ndarray:
    """The memory of an array on the CPU as NumPy, once it is computed: who writes into one writes into the other."""
    return np.asarray(array)


def from_numpy(array: np.ndarray) -> Array:
    """A NumPy array as JAX's, bits kept; over the same memory where that begins at a multiple of 64."""
    return jax.device_put(array)


def is_traced(*arrays: Any) -> bool:
    """Whether there are no values to look at: under jit, grad, vmap, eval_shape; or other processes have some."""
    return any(
        isinstance(a, jax.core.Tracer | jax.ShapeDtypeStruct) or (isinstance(a, Array) and not is_here(a))
        for a in jax.tree.leaves(arrays)
    )


class Inputs(NamedTuple):
    """What `MistralModel` computes with."""

    input_ids: Array | None
    inputs_embeds: Array | None
    attention_mask: Array
    """[B, T] of the new tokens."""
    position_ids: Array | None
    document_ids: Array | None


def model_inputs(
    config: MistralConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: Any = None,
    document_ids: Any = None,
) -> Inputs:
    """Lists, NumPy or JAX arrays as JAX arrays, checked where there are values to look at."""
    if not isinstance(past_key_values, KVCache | None):
        found = type(past_key_values).__name__
        raise InputError(f"past_key_values must be a KVCache, as KVCache.allocate or a call returns it, got {found}.")
    ids = integers("input_ids", input_ids)
    positions = integers("position_ids", position_ids)
    documents = integers("document_ids", document_ids)
    embeds = None if inputs_embeds is None else jnp.asarray(inputs_embeds)
    # asked of the converted arrays: under jit even constants become tracers
    traced = is_traced(ids, attention_mask, positions, embeds, documents, past_key_values)
    mask = attention_mask
    if mask is not None and not traced:
        mask = validate.mask(mask)
    if not traced:
        past = past_key_values
        validate.check_call(
            config,
            input_ids=_values(ids),
            inputs_embeds=_values(embeds),
            attention_mask=mask,
            position_ids=_values(positions),
            document_ids=_values(documents),
            past_length=None if past is None else to_numpy(past.length),
            past_shape=None if past is None else (len(past.keys), *past.keys[0].shape),
            capacity=None if past is None else past.capacity,
        )
    told = traced and positions is not None and documents is None and mask is None and past_key_values is None
    if not traced:
        length = None if past_key_values is None else to_numpy(past_key_values.length)
        told = validate.begins_again(_values(positions), mask, _values(documents), length)
    shape = ids.shape if ids is not None else embeds.shape[:2]
    if told:
        documents = jnp.broadcast_to(documents_of(positions), shape)
    if mask is None:
        mask = jnp.ones(shape, jnp.int32)
    mask = jnp.asarray(mask).astype(jnp.int32)
    return Inputs(ids, embeds, mask[:, mask.shape[1] - shape[1] :], positions, documents)


def documents_of(position_BT: Array) -> Array:
    """[B, T]: the packed document of each token where none are told: one begins where positions begin again."""
    again = position_BT[:, 1:] <= position_BT[:, :-1]
    return jnp.concatenate([jnp.zeros_like(position_BT[:, :1]), again.cumsum(1, dtype=jnp.int32)], axis=1)


def integers(name: str, value: Any, *, rank: int = 2) -> Array | None:
    """Token ids, positions or labels as int32; with rank 2, one dimension is a batch of one."""
    if value is None:
        return None
    if not isinstance(value, Array):
        value = np.asarray(value) if rank != 2 else validate.integers(name, value)
        # clipped so that an id beyond int32 is still out of range, not wrapped into it
        return jnp.asarray(np.clip(value, -(2**31), 2**31 - 1).astype(np.int32))
    if not jnp.issubdtype(value.dtype, jnp.integer):
        validate.integers(name, np.zeros(value.shape, value.dtype))
    if value.ndim == 1 and rank == 2:
        value = value[None]
    if value.ndim != rank:
        raise InputError(f"{name} must have {rank} dimensions, got the shape {tuple(value.shape)}.")
    return value.astype(jnp.int32)


def labels_array(config: MistralConfig, labels: Any, logits: Array) -> Array:
    """Labels of a row classifier as an array beside its logits [B, C]; raises InputError or TokenIdError."""
    if not isinstance(labels, Array):
        labels = np.asarray(labels)
    if not is_traced(labels, logits):
        validate.check_row_labels(config, np.asarray(labels), tuple(logits.shape))
    return jnp.asarray(labels)


def _values(array: Any) -> np.ndarray | None:
    return None if array is None else np.asarray(array)
