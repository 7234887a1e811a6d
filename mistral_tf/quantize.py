"""Matrices of few bits in a finished model: a guest of which layers.py and model.py know nothing."""

from __future__ import annotations

from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.parameters import LM_HEAD
from mistral_core.quantization import models
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import BitsAndBytesConfig as BitsAndBytesConfig
from mistral_core.quantization.request import Quantization as Quantization

from .arrays import from_numpy, to_numpy
from .layers import Head, Layer, Linear
from .products import PackedWeight, dequantised, packed_product

M = TypeVar("M", bound=keras.Model)


class QuantizedLinear(Layer):
    """x W^T from a packed matrix [O, I]; in the dtype of x, or, in the place of a head, in float32."""

    def __init__(self, matrix: PackedMatrix, *, is_head: bool, dtype: Any, name: str | None = None) -> None:
        super().__init__(dtype=dtype, name=name)
        self.kind, self.block, self.is_head = matrix.kind, matrix.block, is_head
        self.activations: str | None = None
        self.out_features, self.in_features = matrix.shape
        self.bias = None
        self.weight_packed = self._kept("weight_packed", matrix.codes)
        self.weight_scale = self._kept("weight_scale", matrix.scale)
        self.weight_zero_point = None if matrix.zero is None else self._kept("weight_zero_point", matrix.zero)

    def _kept(self, name: str, array: np.ndarray) -> keras.Variable:
        return self.add_weight(
            shape=array.shape, dtype=array.dtype.name, initializer=lambda shape, dtype: from_numpy(array),
            trainable=False, autocast=False, name=f"{self.name}.{name}",
        )  # fmt: skip

    def call(self, x: Tensor) -> Tensor:
        return packed_product(x, self.packed, dtype=tf.float32 if self.is_head else None)

    @property
    def packed(self) -> PackedWeight:
        """The matrix as the products take it."""
        kept = self.weight_packed, self.weight_scale, self.weight_zero_point
        tensors = (None if variable is None else tf.convert_to_tensor(variable) for variable in kept)
        return PackedWeight(*tensors, self.kind, self.shape, self.block, self.activations)

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
        codes, scale = to_numpy(self.weight_packed), to_numpy(self.weight_scale)
        zero = None if self.weight_zero_point is None else to_numpy(self.weight_zero_point)
        return PackedMatrix(self.kind, codes, scale, zero, self.shape, self.block)

    @property
    def weight(self) -> Tensor:
        """The matrix [O, I] of floats, made anew for each who asks; an assignment to it is refused."""
        return dequantised(self.packed, tf.float32)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}, block={self.block}"

    def __repr__(self) -> str:
        return f"<QuantizedLinear name={self.name}, {self.extra_repr()}>"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # before Keras takes it for one of the layer's
            models.refuse_write(__package__)
        super().__setattr__(name, value)


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
        rows, columns = part.shape
        floats = dequantised(part.packed, model.variable_dtype)
        kind, options = Head if part.is_head else Linear, {"dtype": part.dtype_policy, "name": part.name}
        with model.distribute_strategy.scope(), tf.device(_device(part)):
            plain = kind(columns, rows, initializer=lambda shape, dtype, floats=floats: floats, **options)
        _replace(model, name, plain)
    return model


def put(model: keras.Model, name: str, matrix: PackedMatrix) -> None:
    """Let the tensor of this canonical name be a packed matrix; it stays where it was, unless a device is given."""
    old = model._module(name)
    with model.distribute_strategy.scope(), tf.device(_device(old)):
        part = QuantizedLinear(matrix, is_head=name == LM_HEAD, dtype=old.dtype_policy, name=old.name)
    _replace(model, name, part)


def _device(part: Layer) -> str:
    return tf.convert_to_tensor(part.weights[0]).device


def _replace(model: keras.Model, name: str, part: Layer) -> None:
    """Let a part of the model be another, at its place among the parts of its owner."""
    old, attribute = model._module(name), name.split(".")[-2]
    owner = model._owner(name)
    part.trainable = old.trainable
    place = [*map(id, owner._layers)].index(id(old))
    model._replace_part(owner, attribute, part)
    owner._layers.insert(place, owner._layers.pop())
