"""Rows times a matrix: all that is known about what is fast on which processor.

A matrix is [out, in], as in every checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import without_autocast


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """x W^T + b over the last axis of x, accumulated in float32, in `dtype`: by default that of x."""
    dtype = x.dtype if dtype is None else dtype
    with without_autocast(x):
        if _is_streamed(x):
            return _streamed(x, weight, bias).to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def converted(weight: Tensor) -> Tensor:
    """A matrix for many products in float32 that are not compiled: on a CPU, converted once and not for each."""
    return weight.float() if weight.device.type == "cpu" else weight


def _is_streamed(x: Tensor) -> bool:
    """Whether a product reads its matrix in one pass: few rows, compiled on a CPU, nothing to differentiate."""
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if not compiled or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, loaded when compiling

    return statically_known_true(x.numel() <= 4 * x.shape[-1])  # a dynamic number of rows stays dynamic


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sums of products in float32, which inductor fuses into one read of W: no float32 copy of it is written."""
    w_OI = weight.float()
    y = torch.stack([(w_OI * row_I).sum(-1) for row_I in x.float().reshape(-1, x.shape[-1]).unbind(0)])
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias.float()
