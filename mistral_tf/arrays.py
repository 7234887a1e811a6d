"""Between NumPy and TensorFlow, and what a user may pass as a model's input."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig, devices, validate
from mistral_core.errors import ConfigError, InputError
from mistral_core.plain import dtype_name

from .cache import KVCache

DTYPES = {
    "float64": tf.float64,
    "float32": tf.float32,
    "float16": tf.float16,
    "bfloat16": tf.bfloat16,
}


def as_dtype(dtype: Any) -> Any:
    """A TensorFlow dtype from itself, its name, or any framework's; raises ConfigError for one no model can have."""
    name = str(dtype_name(dtype))
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[name]


def as_policy(dtype: Any) -> keras.DTypePolicy:
    """The dtypes of computation and parameters: a dtype, a Keras policy or its name; None is Keras' global policy.

    Raises ConfigError for dtypes no model can have.
    """
    if isinstance(dtype, keras.DTypePolicy):
        policy = dtype
    elif dtype is None:
        policy = keras.config.dtype_policy()
    else:
        policy = keras.DTypePolicy(dtype if str(dtype).startswith("mixed_") else as_dtype(dtype).name)
    for name in (policy.compute_dtype, policy.variable_dtype):
        as_dtype(name)
    return policy


def as_device(device: Any) -> str | None:
    """A TensorFlow device's name from its name, a number (-1 is the CPU), or "auto": the first GPU if there is one.

    Raises ConfigError for a device that is not here.
    """
    return None if device is None else devices.find(device, _devices(), framework="TensorFlow")


def _devices() -> dict[str, list[str]]:
    """What is here, by kind."""
    here: dict[str, list[str]] = {"cpu": []}
    for device in tf.config.list_logical_devices():
        kind = device.device_type.lower()
        if "_" not in kind:  # nobody puts a model on a TPU_SYSTEM or an XLA_CPU
            here.setdefault(devices.NAMES.get(kind, kind), []).append(device.name.rpartition("device:")[2])
    return here


def to_numpy(array: Tensor) -> np.ndarray:
    """An array as NumPy, bits kept; bfloat16 is ml_dtypes' in both."""
    return tf.convert_to_tensor(array).numpy()


def memory(array: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as NumPy: who writes into one writes into the other."""
    tensor = tf.convert_to_tensor(array)
    if tensor.dtype == tf.bfloat16:  # which Python's buffers do not know
        return np.asarray(memoryview(tf.bitcast(tensor, tf.uint16))).view(ml_dtypes.bfloat16)
    return np.asarray(memoryview(tensor))


def from_numpy(array: np.ndarray) -> Tensor:
    """A NumPy array as TensorFlow's, bits kept; over the same memory where that begins at a multiple of 64."""
    if array.ctypes.data % 64 or not array.flags.carray:
        return tf.convert_to_tensor(array)
    if array.dtype == ml_dtypes.bfloat16:  # which NumPy's side of DLPack does not know
        return tf.bitcast(from_numpy(array.view(np.int16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def is_traced(*arrays: Any) -> bool:
    """Whether there are no values to look at: inside tf.function, or for Keras' symbolic tensors."""
    symbolic = any(isinstance(a, keras.KerasTensor) for a in arrays)
    return symbolic or not tf.executing_eagerly()


class Inputs(NamedTuple):
    """What `MistralModel` computes with."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    """[B, T] of the new tokens."""
    position_ids: Tensor | None
    document_ids: Tensor | None


def model_inputs(
    config: MistralConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: Any = None,
    document_ids: Any = None,
) -> Inputs:
    """Lists, NumPy arrays or tensors as tensors, checked where there are values to look at."""
    if not isinstance(past_key_values, KVCache | None):
        found = type(past_key_values).__name__
        raise InputError(f"past_key_values must be a KVCache, as KVCache.allocate or a call returns it, got {found}.")
    traced = is_traced(input_ids, attention_mask, position_ids, inputs_embeds, document_ids)
    ids = integers("input_ids", input_ids)
    positions = integers("position_ids", position_ids)
    documents = integers("document_ids", document_ids)
    mask = attention_mask
    if mask is not None and not traced:
        mask = validate.mask(mask)
    if not traced:
        past = past_key_values
        validate.check_call(
            config,
            input_ids=_values(ids),
            inputs_embeds=_values(inputs_embeds),
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
    embeds = None if inputs_embeds is None else tf.convert_to_tensor(inputs_embeds)
    new = ids if ids is not None else embeds[:, :, 0]
    if told:
        documents = tf.broadcast_to(documents_of(positions), tf.shape(new))
    if mask is None:
        mask = tf.ones_like(new, tf.int32)
    mask = tf.cast(mask, tf.int32)[:, -tf.shape(new)[1] :]
    return Inputs(ids, embeds, tf.ensure_shape(mask, new.shape), positions, documents)


def documents_of(position_BT: Tensor) -> Tensor:
    """[B, T]: the packed document of each token where none are told: one begins where positions begin again."""
    again = tf.cast(position_BT[:, 1:] <= position_BT[:, :-1], tf.int32)
    return tf.concat([tf.zeros_like(position_BT[:, :1]), tf.cumsum(again, 1)], axis=1)


def integers(name: str, value: Any, *, rank: int = 2) -> Tensor | None:
    """Token ids, positions or labels as int32; with rank 2, one dimension is a batch of one."""
    if value is None:
        return None
    if isinstance(value, tf.RaggedTensor):
        raise InputError(f"{name}: rows of different lengths; give their to_tensor() and an attention_mask.")
    if tf.is_tensor(value) and not is_traced(value):
        value = to_numpy(value)  # checked before a cast could wrap it
    if not tf.is_tensor(value) and not isinstance(value, keras.KerasTensor):
        value = np.asarray(value) if rank != 2 else validate.integers(name, value)
        # clipped so that an id beyond int32 is still out of range, not wrapped into it
        return tf.convert_to_tensor(np.clip(value, -(2**31), 2**31 - 1).astype(np.int32))
    if not tf.as_dtype(value.dtype).is_integer:
        validate.integers(name, np.zeros([1, 1], tf.as_dtype(value.dtype).as_numpy_dtype))
    if len(value.shape) == 1 and rank == 2:
        value = value[None]
    if len(value.shape) != rank:
        raise InputError(f"{name} must have {rank} dimensions, got the shape {tuple(value.shape)}.")
    return tf.cast(value, tf.int32)


def labels_array(config: MistralConfig, labels: Any, logits: Tensor) -> Tensor:
    """Labels of a row classifier as an array beside its logits [B, C]; raises InputError or TokenIdError."""
    labels = tf.convert_to_tensor(labels)
    if not is_traced(labels, logits):
        validate.check_row_labels(config, to_numpy(labels), tuple(logits.shape))
    return labels


def _values(array: Any) -> np.ndarray | None:
    return None if array is None else to_numpy(array)
