"""Matrices of few bits in a finished model: a guest of which layers.py and model.py know nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mistral_core.errors import UnsupportedFeatureError
from mistral_core.parameters import LM_HEAD
from mistral_core.quantization import models
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import BitsAndBytesConfig as BitsAndBytesConfig
from mistral_core.quantization.request import Quantization as Quantization

from .arrays import from_numpy, to_numpy
from .layers import Head
from .products import PackedWeight, dequantised, packed_product

M = TypeVar("M", bound=nn.Module)


class QuantizedLinear(nn.Linear):
    """x W^T from a packed matrix [O, I]; in the dtype of x, or, in the place of a head, in float32."""

    activations: str | None = None

    def __init__(self, matrix: PackedMatrix, *, is_head: bool, device: torch.device | str | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.bias = None
        self.kind, self.block, self.is_head = matrix.kind, matrix.block, is_head
        self.register_buffer("weight_packed", from_numpy(matrix.codes).to(device))
        self.register_buffer("weight_scale", from_numpy(matrix.scale).to(device))
        zero = None if matrix.zero is None else from_numpy(matrix.zero).to(device)
        self.register_buffer("weight_zero_point", zero)

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.packed, dtype=torch.float32 if self.is_head else None)

    @property
    def packed(self) -> PackedWeight:
        """The matrix as the products take it."""
        held = self._buffers  # an attribute of a module is looked for in several places
        codes, scale, zero = held["weight_packed"], held["weight_scale"], held["weight_zero_point"]
        shape = self.out_features, self.in_features
        return PackedWeight(codes, scale, zero, self.kind, shape, self.block, self.activations)

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
        return dequantised(self.packed, torch.float32).as_subclass(_ReadOnly)

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}, block={self.block}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # before torch takes it for a parameter
            models.refuse_write(__package__)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """torch's way to move and cast; scales move, and keep their dtype."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_packed.device)
        return self


class _ReadOnly(Tensor):
    """The floats of a packed matrix: who writes into them, as adapters do when they merge, would write into nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The same numbers; raises UnsupportedFeatureError when it is assigned to."""
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        models.refuse_write(__package__)


def quantize(model: M, quantization: Any = "int8", **options: Any) -> M:
    """Pack the matrices of a finished model where they are, one after another, and return it.

    `quantization` is a scheme, a `Quantization`, or a config of transformers; `options` are the fields of
    `Quantization`. What is packed already stays, and takes its activations as asked for. Raises ConfigError,
    UnsupportedFeatureError, NonFiniteWeightsError.
    """
    return models.packed(model, put, quantization, **options)


def dequantize(model: M) -> M:
    """Make floats of all packed matrices of a model, in its dtype, and return it.

    Raises UnsupportedFeatureError where it has adapters, or they are cut over processes.
    """
    model._refuse_adapters("dequantize")
    if model.base_model.placement is not None:
        raise UnsupportedFeatureError(
            "dequantize: this model is cut over processes; load it with 'dequantize' instead."
        )
    for name, part in list(model.packed_parts()):
        plain = Head(1, 1, bias=False) if part.is_head else nn.Linear(1, 1, bias=False)
        plain.out_features, plain.in_features = part.shape
        plain.weight = nn.Parameter(dequantised(part.packed, model.dtype))
        _replace(model, name, plain)
    return model


def put(model: nn.Module, name: str, matrix: PackedMatrix, *, device: torch.device | str | None = None) -> None:
    """Let the tensor of this canonical name be a packed matrix; it stays where it was, unless a device is given."""
    old = model._module(name).weight.device
    device = old if device is None and old.type != "meta" else device
    placement, is_head = model.base_model.placement, name == LM_HEAD
    if placement is None:
        _replace(model, name, QuantizedLinear(matrix, is_head=is_head, device=device))
    else:
        _replace(model, name, placement.packed(name, matrix, is_head=is_head, device=device))


def _replace(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, attribute = model._own_name(name).removesuffix(".weight").rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, attribute, part.train(getattr(owner, attribute).training))
