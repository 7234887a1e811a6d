"""Matrices of few bits in a finished model: a guest of which layers.py and model.py know nothing."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core.errors import ConfigError, UnsupportedFeatureError
from mistral_core.parameters import LM_HEAD
from mistral_core.quantization import models
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import BitsAndBytesConfig as BitsAndBytesConfig
from mistral_core.quantization.request import Quantization as Quantization

from .arrays import from_numpy, to_numpy
from .layers import Head, Linear
from .products import PackedWeight, dequantised, packed_product

M = TypeVar("M", bound=nnx.Module)


class Packed(nnx.Variable[Array]):
    """An array of a matrix of few bits: no nnx.Param, so optimizers, gradients and `model.params` pass it by."""


def _refuse(holder: Any, value: Any) -> None:
    models.refuse_write(__package__)


class QuantizedLinear(nnx.Module):
    """x W^T from a packed matrix [O, I]; in the dtype of x, or, in the place of a head, in float32."""

    def __init__(self, matrix: PackedMatrix, *, is_head: bool, device: Any = None) -> None:
        self.out_features, self.in_features = matrix.shape
        self.bias = None
        self.kind, self.block, self.is_head = matrix.kind, matrix.block, is_head
        self.activations: str | None = None
        self.weight_packed = Packed(_placed(matrix.codes, device))
        self.weight_scale = Packed(_placed(matrix.scale, device, is_scale=True))
        self.weight_zero_point = None if matrix.zero is None else Packed(_placed(matrix.zero, device, is_scale=True))

    def __call__(self, x: Array) -> Array:
        return packed_product(x, self.packed, dtype=jnp.float32 if self.is_head else None)

    @property
    def packed(self) -> PackedWeight:
        """The matrix as the products take it."""
        zero = self.weight_zero_point
        codes, scale, zero = self.weight_packed[...], self.weight_scale[...], None if zero is None else zero[...]
        return PackedWeight(codes, scale, zero, self.kind, self.shape, self.block, self.activations)

    @property
    def factor(self) -> PackedWeight | None:
        """The W of x W^T, where a call is nothing else; None where it is."""
        return self.packed if type(self) is QuantizedLinear and self.activations is None else None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.out_features, self.in_features

    @property
    def matrix(self) -> PackedMatrix:
        """The matrix in NumPy, bits kept."""
        codes, scale, zero = (None if array is None else to_numpy(array) for array in self.packed[:3])
        return PackedMatrix(self.kind, codes, scale, zero, self.shape, self.block)

    @property
    def weight(self) -> nnx.Variable[Array]:
        """The matrix [O, I] of floats, made anew for each who asks; an assignment to it is refused."""
        return _ReadOnly(dequantised(self.packed, jnp.float32))

    weight = weight.setter(_refuse)


class _ReadOnly(nnx.Variable[Array]):
    """The floats of a packed matrix: who writes into them, as adapters do when they merge, would write into nothing."""

    def set_value(self, value: Any, **options: Any) -> None:
        """Raises UnsupportedFeatureError."""
        _refuse(self, value)


def quantize(model: M, quantization: Any = "int8", **options: Any) -> M:
    """Pack the matrices of a finished model where they are, one after another, and return it.

    `quantization` is a scheme, a `Quantization`, or a config of transformers; `options` are the fields of
    `Quantization`. What is packed already stays, and takes its activations as asked for. Raises ConfigError,
    UnsupportedFeatureError, NonFiniteWeightsError.
    """
    return models.packed(model, put, quantization, **options)


def dequantize(model: M) -> M:
    """Make floats of all packed matrices of a model, in its dtype, and return it.

    Raises UnsupportedFeatureError where it has adapters.
    """
    model._refuse_adapters("dequantize")
    for name, part in list(model.packed_parts()):
        _replace(model, name, _plain(part, model.param_dtype))
    return model


def _plain(part: QuantizedLinear, dtype: Any) -> Linear:
    kind, (size_out, size_in) = Head if part.is_head else Linear, part.shape
    plain = nnx.eval_shape(lambda: kind(size_in, size_out, param_dtype=dtype, rngs=nnx.Rngs(0), std=0.0))
    plain.weight.set_value(dequantised(part.packed, dtype))
    return plain


def put(model: nnx.Module, name: str, matrix: PackedMatrix, *, device: Any = None) -> None:
    """Let the tensor of this canonical name be a packed matrix; it stays where it was, unless a device is given.

    A Sharding cuts the codes as it would the floats, and the scales with them, or with their rows, where it can; raises
    ConfigError where it cannot cut the codes, UnsupportedFeatureError where layers are stacked.
    """
    old = jax.tree.leaves(nnx.state(model._part(name)[0]))[0]
    if device is None and isinstance(old, Array):
        device = old.device
    _replace(model, name, QuantizedLinear(matrix, is_head=name == LM_HEAD, device=device))


def _replace(model: nnx.Module, name: str, part: nnx.Module) -> None:
    module = name.removesuffix(".weight")
    owner, layer = model._part(module)
    if layer is not None:
        raise UnsupportedFeatureError(
            f"{name} must be an array of its own to change its packing, and is stacked; call unscan_layers(model) "
            "first, and scan_layers(model) again."
        )
    setattr(owner, module.rpartition(".")[2], part)


def _placed(array: np.ndarray, device: Any, *, is_scale: bool = False) -> Array:
    """An array where it goes; of a Sharding, each device gets its own part of it."""
    if not isinstance(device, jax.sharding.Sharding):
        return jax.device_put(from_numpy(array), device)
    return jax.make_array_from_callback(
        array.shape, _cut(array.shape, device, is_scale=is_scale), lambda index: array[index]
    )


def move(part: QuantizedLinear, device: jax.sharding.Sharding) -> None:
    """Let a packed matrix be where a Sharding says, as `put` places one; raises ConfigError."""
    for name in ("weight_packed", "weight_scale", "weight_zero_point"):
        if (variable := getattr(part, name)) is not None:
            array = variable.get_value()
            where = _cut(array.shape, device, is_scale=name != "weight_packed")
            variable.set_value(jax.device_put(array, where))


def _cut(shape: tuple[int, ...], device: jax.sharding.Sharding, *, is_scale: bool) -> jax.sharding.Sharding:
    """How a Sharding of a matrix cuts an array of it: scales as the matrix, else by rows, else not at all."""
    ways = [device]
    if is_scale and isinstance(device, jax.sharding.NamedSharding):
        ways += [jax.sharding.NamedSharding(device.mesh, jax.P(*axes)) for axes in (device.spec[: len(shape) - 1], ())]
    for way in ways:
        with contextlib.suppress(ValueError):
            way.shard_shape(shape)
            return way
    raise ConfigError(
        f"device must be a Sharding that cuts packed arrays evenly, got {device} for {shape}; shard rows alone, "
        "or name a device."
    )
