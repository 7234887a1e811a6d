"""Attention in C, on CPUs: of any text, window, padding and past, without a mask.

It computes the scores that a query sees, by blocks of queries and keys, where gradients are off. torch's fused kernel
reads a mask of all of them, or computes a window in pieces (`bands`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mistral_core.native import attention

from . import native
from .cache import has_values

LEAST = 64
"""The fewest tokens of a call for which C is asked, and for attention alone, which packs all keys, of each row."""


class Told(NamedTuple):
    """What C is told of who sees whom, and what layers of one window share: int64, as they lie in memory."""

    query_order_BT: Tensor
    """[B, T]: the number of real tokens before each query in its row, -1 for padding."""
    key_order_BS: Tensor
    """[B, S]: the same of each key."""
    window: int | None
    document_ids_BT: Tensor | None = None
    """[B, T]: the packed document of each token."""


def may_be_for_c(x_BT: Tensor, head_dim: int) -> bool:
    """Whether C may compute with tokens: enough of them, of its types, and nobody who misses what torch would do.

    Where gradients are on nothing is in C, whether they go through it or not, as in `between`.
    """
    if not native.unwatched(x_BT) or torch.is_grad_enabled():  # a compiler is to see no size asked for
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
    return Told(*orders, window, document_ids_BT)


def is_for_c(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> bool:
    """Whether C may compute the attention of tensors: enough queries, of its types, where nobody misses anything."""
    alike = len({x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)}) == 1 and native.unwatched(q_BTNH, k_BSKH, v_BSKH)
    return alike and may_be_for_c(q_BTNH, q_BTNH.shape[3])


def attend_in_c(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, query_order_BT: Tensor, key_order_BS: Tensor, *, window: int | None,
    document_ids_BT: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """softmax(q k / sqrt(H)) v [B, T, N, H], zeros where nothing is seen, for tensors of which `is_for_c` is true.

    The rest is a `Told`'s, int64. None where a key that is seen is not there.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    numbers = [query_order_BT.expand(B, T).contiguous(), key_order_BS.expand(B, S).contiguous()]
    if document_ids_BT is not None:
        numbers.append(document_ids_BT.expand(B, S).contiguous())
    q, k, v = (x.contiguous() for x in (q_BTNH, k_BSKH, v_BSKH))
    o_BTNH = torch.empty_like(q)
    there = attention.attend(
        native.TYPES[q.dtype], (B, T, S, N, K, H), window, q.data_ptr(), k.data_ptr(), v.data_ptr(),
        o_BTNH.data_ptr(), *(x.data_ptr() for x in numbers), threads=torch.get_num_threads(), parallel=native.openmp(),
    )  # fmt: skip
    return o_BTNH if there else None
