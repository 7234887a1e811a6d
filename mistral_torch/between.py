"""What a layer computes between its products: in C in one pass over memory, on a CPU where gradients are off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mistral_core.native import between, library

from . import native
from .tiles import again

LEAST = 4096
"""The fewest numbers for which C is asked: the operations of torch take as long for fewer."""


def in_one_pass(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula of tensors, which the function of the same name here computes in C where it can.

    The formula is what is differentiated, compiled, mapped and exported, and what other devices compute.
    """
    in_c = globals()[formula.__name__]

    @functools.wraps(formula)
    def computed(x: Tensor, *others: Any) -> Tensor:
        y = in_c(x, *others)
        return formula(x, *others) if y is None else y

    return computed


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x^2) + eps) cast to the dtype of x, times the weight [D]; None where C does not compute it."""
    if not _is_for_c(x_BTD, weight_D) or weight_D.shape != x_BTD.shape[-1:] or weight_D.dtype != x_BTD.dtype:
        return None
    y_BTD, D = torch.empty_like(x_BTD), x_BTD.shape[-1]
    given = (x_BTD.data_ptr(), weight_D.data_ptr(), y_BTD.data_ptr(), x_BTD.numel() // D, D, eps)
    _run(between.functions().mistral_rms_norm, x_BTD, given)
    return y_BTD


def rotate(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor | None:
    """The pairs (x_i, x_{i+H/2}) turned by their angles; None where C does not compute it."""
    if not _is_for_c(x_BTNH, cos_BTH, sin_BTH):
        return None
    B, T, N, H = x_BTNH.shape
    if any(each.shape != (B, T, H // 2) or each.dtype != torch.float32 for each in (cos_BTH, sin_BTH)):
        return None
    y_BTNH = torch.empty_like(x_BTNH)
    given = (x_BTNH.data_ptr(), cos_BTH.data_ptr(), sin_BTH.data_ptr(), y_BTNH.data_ptr(), B * T, N, H)
    _run(between.functions().mistral_rotate, x_BTNH, given)
    return y_BTNH


def gated(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) cast to its dtype, times up; None where C does not compute it."""
    if not _is_for_c(gate, up) or up.shape != gate.shape or up.dtype != gate.dtype:
        return None
    y, F = torch.empty_like(gate), gate.shape[-1]
    given = (gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel() // F, F)
    _run(between.functions().mistral_gated, gate, given)
    return y


def _is_for_c(x: Tensor, *others: Tensor) -> bool:
    """Whether C may compute with tensors: unwatched, without gradients, enough, in one piece and of its types.

    Where gradients are on nothing is in C, whether they go through it or not: a model that learns in part, and one that
    was merged or frozen since, compute the same bits.
    """
    if x.dtype not in native.OWN or not native.unwatched(x, *others) or torch.is_grad_enabled() or again():
        return False
    whole = all(each.is_contiguous() for each in (x, *others))
    return whole and x.numel() >= LEAST and between.functions() is not None


def _run(function: Callable[..., int], x: Tensor, given: tuple[Any, ...]) -> None:
    library.check(function(native.openmp(), native.TYPES[x.dtype], *given, torch.get_num_threads()))
