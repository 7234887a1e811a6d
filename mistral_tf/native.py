"""The kernels in C as functions of tensors: few rows times a packed matrix, and a step of decoding as a whole."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.classes import runs_its_own
from mistral_core.errors import InputError, MissingExtraError
from mistral_core.native import attention, library, whole_step

from .arrays import memory
from .traces import is_portable

_OWN = (tf.float32, tf.bfloat16)
"""The dtypes of x that kernels take as they are."""


@functools.cache
def _registered() -> tuple[Any, str]:
    """TensorFlow's operations for the kernels, and why there are none: empty where there are."""
    flags = (*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags(), f'-DTENSORFLOW="{tf.__version__}"')
    flags = tuple(flag for flag in flags if not flag.startswith("--std="))
    return library.bound("tf.c", flags, _loaded, attention=attention.addresses())


def _loaded(path: str) -> Any:
    try:
        return tf.load_op_library(path)
    except tf.errors.OpError as error:
        raise RuntimeError(error.message) from error


def operations() -> Any:
    """TensorFlow's operations for what is in C, where there are some."""
    return _registered()[0]


def available() -> bool:
    """Whether there are kernels for tensors on a CPU; the first call compiles them."""
    return not _registered()[1]


def usable() -> bool:
    """Whether C may compute what is called or traced now: on CPUs, and neither to be saved nor compiled by XLA."""
    return not is_portable() and is_on_cpu() and available()


def is_on_cpu() -> bool:
    """Whether all devices are CPUs."""
    return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())


def why() -> str:
    """Why there are no kernels, as a sentence; empty where there are."""
    return _registered()[1]


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    activations: str | None = None,
) -> Tensor:
    """x W^T over the last axis of x, accumulated in float32, in the dtype of x; it has no derivative.

    The rest is a `PackedMatrix`'s. Not for what XLA compiles. Raises InputError, and MissingExtraError where there are
    no kernels.
    """
    numbers = _checked(codes, scale, zero, kind, shape, block, activations)
    if x.shape[-1] not in (None, shape[1]):
        raise InputError(f"x must be [..., {shape[1]}], got {x.shape}.")
    as_given = x.dtype
    if as_given not in _OWN:
        x = tf.cast(x, tf.float32)
    zeros = [] if zero is None else [zero]
    return tf.cast(operations().mistral_packed_product(x, codes, scale, zeros, numbers=numbers), as_given)


def dequantised(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: Any = None,
) -> Tensor:
    """The matrix [O, I] as float32, the default, or bfloat16.

    Raises InputError, and MissingExtraError where there are no kernels.
    """
    numbers = _checked(codes, scale, zero, kind, shape, block, None)
    dtype = tf.as_dtype(tf.float32 if dtype is None else dtype)
    if dtype not in _OWN:
        raise InputError(f"dtype must be float32 or bfloat16, got {dtype.name}.")
    zeros = [] if zero is None else [zero]
    result = operations().mistral_dequantised(codes, scale, zeros, numbers=numbers, T=dtype)
    return tf.ensure_shape(result, shape)


def whole_step_of(model: Any) -> whole_step.WholeStep | None:
    """The step in C of a language model on a CPU; None where it has parts that compute something else, or other dtypes.

    It reads the weights where they are: it is for as long as these stay.
    """
    plain = all(map(is_plain, model._flatten_layers())) and model.compute_dtype == model.variable_dtype
    if not is_on_cpu() or not plain or tf.distribute.has_strategy() or not available():
        return None
    return whole_step.of_model(
        model, dtype=model.compute_dtype, array=lambda name: memory(model._parameter(name)), memory=memory
    )


def is_plain(module: keras.layers.Layer) -> bool:
    """Whether calling a module does what its class says, as it was written, and no more."""
    return (
        type(module).__module__.partition(".")[0] == __package__
        and runs_its_own(module, "call")
        and not getattr(module, "adds", ())
    )


def _checked(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    activations: str | None,
) -> list[int]:
    """What C is told of a matrix. Raises InputError unless its tensors are of their sizes."""
    if reason := _registered()[1]:
        raise MissingExtraError(f"kernels in C must be there, got none: {reason}")
    shapes = (tuple(codes.shape), tuple(scale.shape), None if zero is None else tuple(zero.shape))
    return list(library.numbers(kind, tuple(shape), tuple(block), activations, *shapes))
