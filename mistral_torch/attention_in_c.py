"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys, forth and back. torch's fused kernel reads a
mask of all of them, or computes a window in pieces (`bands`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistral_core.native import attention

from . import native
from .cache import has_values

LEAST = 64
"""The fewest tokens of a call for which C is asked, and for attention alone, which packs all keys, of each row."""

Formula = Callable[..., Tensor]
"""The same of queries, keys, values, the orders of both and documents or none, in torch's own operations."""


class Told(NamedTuple):
    """What C is told of who sees whom, and what layers of one window share: int64, as they lie in memory.

    Documents are numbers of 32 bits.
    """

    query_order_BT: Tensor
    """[B, T]: the number of real tokens before each query in its row, -1 for padding."""
    key_order_BS: Tensor
    """[B, S]: the same of each key."""
    window: int | None
    document_ids_BT: Tensor | None = None
    """[B, T]: the packed document of each token."""


def may_be_for_c(x_BT: Tensor, head_dim: int) -> bool:
    """Whether C may compute with tokens: enough of them, of its types, and nobody who misses what torch would do."""
    if not native.unwatched(x_BT):  # a compiler is to see no size asked for
        return False
    if x_BT.shape[:2].numel() < LEAST or x_BT.shape[1] == 1 or x_BT.dtype not in native.OWN:
        return False
    return not torch.is_autocast_enabled("cpu") and attention.available(native.TYPES[x_BT.dtype], head_dim)


def told_of(
    query_order_BT: Tensor, key_order_BS: Tensor, window: int | None, document_ids_BT: Tensor | None = None
) -> Told | None:
    """Who sees whom, as C is told; None where rows are short."""
    if query_order_BT.shape[1] < LEAST or not has_values(query_order_BT) or not has_values(key_order_BS):
        return None
    orders = (x.to(torch.int64).contiguous() for x in (query_order_BT, key_order_BS))
    if document_ids_BT is not None:
        document_ids_BT = document_ids_BT.expand_as(query_order_BT).to(torch.int64).contiguous()
        if document_ids_BT.abs().max() > torch.iinfo(torch.int32).max:
            document_ids_BT = torch.unique(document_ids_BT, return_inverse=True)[1]
    return Told(*orders, window, document_ids_BT)


def is_for_c(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> bool:
    """Whether C may compute the attention of tensors: enough queries, of its types, where nobody misses anything."""
    alike = len({x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}) == 1 and native.unwatched(q_BTNH, k_BSKH, v_BSKH)
    return alike and may_be_for_c(q_BTNH, q_BTNH.shape[3])


def attend_in_c(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, query_order_BT: Tensor, key_order_BS: Tensor, *, window: int | None,
    document_ids_BT: Tensor | None = None, formula: Formula,
) -> Tensor | None:  # fmt: skip
    """softmax(q k / sqrt(H)) v [B, T, N, H], zeros where nothing is seen, for tensors of which `is_for_c` is true.

    The rest is a `Told`'s, int64. `formula` is what is differentiated where somebody watches the gradients, or wants
    gradients of them. None where a key that is seen is not there.
    """
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    numbers = [query_order_BT.expand(B, T).contiguous(), key_order_BS.expand(B, S).contiguous()]
    if document_ids_BT is not None:
        numbers.append(document_ids_BT.expand(B, S).contiguous())
    if not native.learnt(q_BTNH, k_BSKH, v_BSKH):
        return _attended(q_BTNH, k_BSKH, v_BSKH, numbers, window)
    try:
        return _Attended.apply(q_BTNH, k_BSKH, v_BSKH, numbers, window, formula)
    except _MissingKeyError:
        return None


class _MissingKeyError(Exception):
    """A key that is seen is not there."""


class _Attended(torch.autograd.Function):
    """Attention and its gradients, for which scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTNH: Tensor,
        k_BSKH: Tensor,
        v_BSKH: Tensor,
        numbers: list[Tensor],
        window: int | None,
        formula: Formula,
    ) -> Tensor:
        o_BTNH = _attended(q_BTNH, k_BSKH, v_BSKH, numbers, window)
        if o_BTNH is None:
            raise _MissingKeyError
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH, o_BTNH)
        ctx.numbers, ctx.window, ctx.formula = numbers, window, formula
        return o_BTNH

    @staticmethod
    def backward(ctx: Any, upstream_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        *floats, o_BTNH = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or not native.unwatched(upstream_BTNH):
            with torch.enable_grad():
                floats = [x if again and x.requires_grad else x.detach().requires_grad_() for x in floats]
                o_BTNH = ctx.formula(*floats, *ctx.numbers, window=ctx.window)
                gradients = torch.autograd.grad(o_BTNH, floats, upstream_BTNH, create_graph=again)
        else:
            gradients = _gradients(floats, o_BTNH, upstream_BTNH, ctx.numbers, ctx.window)
        return *gradients, None, None, None


def _gradients(
    floats: list[Tensor], o_BTNH: Tensor, upstream_BTNH: Tensor, numbers: list[Tensor], window: int | None
) -> list[Tensor]:
    given = [x.contiguous() for x in (*floats, o_BTNH, upstream_BTNH)]
    found, numbers = [torch.empty_like(x) for x in given[:3]], [x.to(torch.int32) for x in numbers]
    attention.gradients(*_described(*given[:2], window), *_addresses(*given, *found, *numbers), **_threads())
    return found


def _attended(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, numbers: list[Tensor], window: int | None
) -> Tensor | None:
    given = [x.contiguous() for x in (q_BTNH, k_BSKH, v_BSKH)]
    o_BTNH = torch.empty_like(given[0])
    there = attention.attend(*_described(*given[:2], window), *_addresses(*given, o_BTNH, *numbers), **_threads())
    return o_BTNH if there else None


def _described(q_BTNH: Tensor, k_BSKH: Tensor, window: int | None) -> tuple[int, tuple[int, ...], int | None]:
    """The type, the sizes and the window, as C is told."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    return native.TYPES[q_BTNH.dtype], (B, T, S, N, K, H), window


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _threads() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "parallel": native.openmp()}
