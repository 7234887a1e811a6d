"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_core.quantization.matrix import KINDS, ROUNDED_COLUMNS

from . import native
from .arrays import without_autocast

STREAMED_ROWS = 4
"""The most rows for which a compiled product on a CPU reads its matrix in one pass."""
PACKED_ROWS = 16
"""The most rows that are multiplied from packed bytes in C; for more, floats are made of the matrix first."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    dtype = x.dtype if dtype is None else dtype
    with without_autocast(x):
        if _is_streamed(x):
            return _streamed(x, weight, bias).to(dtype)
        if dtype == torch.float32 and _is_widened(x, weight):
            y = native.widened_product(x.float(), weight)
            return y if bias is None else y + bias.float()
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def converted(weight: Tensor) -> Tensor:
    """A matrix for many products in float32 that are not compiled: on a CPU, converted once and not for each.

    That of bfloat16 is multiplied as it is where there are kernels.
    """
    if weight.device.type != "cpu" or (weight.dtype == torch.bfloat16 and _has_kernels()):
        return weight
    return weight.float()


class PackedWeight(NamedTuple):
    """A matrix [O, I] of few bits: the fields of `mistral_core.quantization.matrix.PackedMatrix` as tensors."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    kind: str
    shape: tuple[int, int]
    block: tuple[int, int]
    activations: str | None = None
    """int8: what is multiplied is rounded to eight bits first; None: it is taken as it is."""


def packed_product(x: Tensor, weight: PackedWeight, *, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T over the last axis of x from the packed bytes, accumulated in float32, in `dtype`: by default that of x.

    Gradients are those of x alone; nothing is kept for them but the packed bytes.
    """
    dtype = x.dtype if dtype is None else dtype
    with without_autocast(x):
        if native.transformed():  # torch does so with its own operations
            return _with_floats(x, weight, dequantised(weight, dtype))
        if native.learnt(x):
            return _PackedProduct.apply(x, weight, dtype)
        return _packed_product(x, weight, dtype)


def as_floats(weight: Tensor | PackedWeight) -> Tensor:
    """A matrix [O, I] in float32 for a moment, packed or not."""
    return _floats(weight, torch.float32) if isinstance(weight, PackedWeight) else weight.float()


_NF4 = KINDS["nf4"].values.tolist()


def dequantised(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] in torch's own operations, computed in float32 and rounded once."""
    return (_numbers(weight) * _spread(weight.scale.float(), weight)).to(dtype)


def _numbers(weight: PackedWeight) -> Tensor:
    """What the codes mean, less what means 0: float32 [O, I]."""
    if weight.kind == "int8":
        numbers = weight.codes.float()
    elif weight.kind == "fp8":
        numbers = weight.codes.view(torch.float8_e4m3fn).float()
    else:
        codes = torch.stack([weight.codes & 15, weight.codes >> 4], dim=-1).reshape(weight.shape[0], -1)
        codes = codes[:, : weight.shape[1]]
        # arithmetic is faster than a look-up
        numbers = codes.float() - 8 if weight.kind == "int4" else torch.tensor(_NF4, device=codes.device)[codes.int()]
    return numbers if weight.zero is None else numbers - _spread(weight.zero.float(), weight)


def _spread(values: Tensor, weight: PackedWeight) -> Tensor:
    """The value of its block for every number."""
    for axis, size in enumerate(weight.shape):
        if values.shape[axis] > 1 or weight.block[axis] < size:
            values = values.repeat_interleave(weight.block[axis], axis).narrow(axis, 0, size)
    return values


def _packed_product(x: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The product as is fastest for these rows: from the packed bytes, or with the matrix as floats for a moment."""
    codes, scale, zero, kind, shape, block, activations = weight
    if _is_in_c(weight) and dtype != torch.float64 and _has_few_rows(x, PACKED_ROWS):
        wide = x.float() if dtype == torch.float32 else x.to(dtype)
        return native.product(wide, codes, scale, zero, kind=kind, shape=shape, block=block, activations=activations)
    return _with_floats(x, weight, _floats(weight, dtype))


def _with_floats(x: Tensor, weight: PackedWeight, floats: Tensor) -> Tensor:
    """The product with the floats that a matrix means."""
    if weight.activations is not None:
        x = rounded(x)
    return F.linear(x.to(floats.dtype), floats)


def _floats(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [O, I] for a moment, made by the kernels in C where they are."""
    if _is_in_c(weight) and dtype in (torch.float32, torch.bfloat16):
        codes, scale, zero, kind, shape, block, _ = weight
        return native.dequantised(codes, scale, zero, kind=kind, shape=shape, block=block, dtype=dtype)
    return dequantised(weight, dtype)


def rounded(x: Tensor) -> Tensor:
    """x rounded to eight bits in blocks of columns, as floats: the formula of `reference.quantized.rounded_rows`."""
    codes = []
    for part in x.float().split(ROUNDED_COLUMNS, dim=-1):
        scale = part.abs().amax(-1, keepdim=True) / 127
        seen = scale >= torch.finfo(torch.float32).tiny
        codes.append(torch.where(seen, (part / torch.where(seen, scale, 1)).round() * scale, 0))
    return torch.cat(codes, dim=-1).to(x.dtype)


def _is_in_c(weight: PackedWeight) -> bool:
    """Whether C computes with a matrix: on a CPU, and in no program that other machines are to run."""
    return weight.codes.device.type == "cpu" and not torch.compiler.is_exporting() and _has_kernels()


def _has_kernels() -> bool:
    return native.available()


# what torch.compiler.assume_constant_result writes; that would load the compiler, which takes as long as torch does
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _PackedProduct(torch.autograd.Function):
    """The product, whose gradient is the product with the matrix as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return _packed_product(x, weight, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient @ _floats(ctx.weight, gradient.dtype)).to(ctx.dtype), None, None


def _is_widened(x: Tensor, weight: Tensor) -> bool:
    """Whether a product in float32 reads a bfloat16 matrix as it is: few rows at once on a CPU, without gradients."""
    if weight.dtype != torch.bfloat16 or not native.unwatched(x, weight) or native.learnt(x, weight):
        return False
    return _has_few_rows(x, PACKED_ROWS) and _has_kernels()


def _is_streamed(x: Tensor) -> bool:
    """Whether a product reads its matrix in one pass: few rows, compiled on a CPU, nothing to differentiate."""
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if not compiled or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return _has_few_rows(x, STREAMED_ROWS)


def _has_few_rows(x: Tensor, most: int) -> bool:
    """Whether x has at most so many rows, as far as is known where it is compiled: a dynamic number stays dynamic."""
    if not torch.compiler.is_dynamo_compiling():
        return x.numel() <= most * x.shape[-1]
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, loaded when compiling

    return statically_known_true(x.numel() <= most * x.shape[-1])


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sums of products in float32, which inductor fuses into one read of W: no float32 copy of it is written."""
    w_OI = weight.float()
    y = torch.stack([(w_OI * row_I).sum(-1) for row_I in x.float().reshape(-1, x.shape[-1]).unbind(0)])
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.float()
