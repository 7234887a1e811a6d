"""Long texts on a CPU: a window is a band of scores, computed in pieces by torch's kernel, which then needs no mask.

Of a block of at most W queries the band is a triangle of the block's own keys, a rectangle of keys that all of its
queries see, and a triangle of the oldest keys, which is causal where time runs backwards. The kernel skips what a
triangle hides, and each piece returns the logarithm of its sum of exponentials, by which outputs are put together
(https://arxiv.org/abs/2205.14135, section 3.1); with the sums of all pieces its own gradient gives theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import LONG, looked
from .cache import has_values

COLUMNS = 4096
"""The most queries of a block."""
LEAST = 256
"""The smallest window that is worth pieces: the kernel computes with so many queries at a time."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Run(NamedTuple):
    """Tokens in order without a gap, of one row and one document: its columns among queries, and among keys."""

    row: int
    queries: slice
    keys: slice
    """The last one is the last query's."""


class _Piece(NamedTuple):
    """A part of a band: its queries and keys, counted from the run's first ones."""

    queries: slice
    keys: slice
    is_causal: bool = False
    """Whether query number i sees the keys up to number i; else each sees all."""
    backwards: bool = False
    """Whether they are numbered from the last one."""


def runs_of(
    query_order_BT: Tensor, key_order_BS: Tensor, window: int | None, document_ids_BT: Tensor | None = None
) -> tuple[Run, ...] | None:
    """The runs of a long text on a CPU; None where tokens are not in order, or its window is small."""
    if not has_values(query_order_BT) or not query_order_BT.is_cpu:
        return None
    T, S = query_order_BT.shape[1], key_order_BS.shape[1]
    if T < LONG or S < T or not (window is None or window >= LEAST):
        return None
    # the name is a GPU's, and its switch a CPU's too
    if not torch.backends.cuda.flash_sdp_enabled() or not looked(query_order_BT, key_order_BS)[0]:
        return None
    found = []
    for row in range(len(query_order_BT)):
        queries, keys = ((x[row] >= 0).nonzero().flatten() for x in (query_order_BT, key_order_BS))
        if not len(queries):
            continue
        first, end, first_key = int(queries[0]), int(queries[-1]) + 1, int(keys[0])
        if document_ids_BT is None:
            found.append(Run(row, slice(first, end), slice(first_key, end + S - T)))
            continue
        lengths = document_lengths(document_ids_BT[row, first:end])
        if lengths is None:
            return None
        ends = (first + lengths.cumsum(0)).tolist()
        texts = [slice(*each) for each in zip([first, *ends], ends, strict=False)]
        found.extend(Run(row, text, text) for text in texts)
    return tuple(found)


def document_lengths(ids_T: Tensor) -> Tensor | None:
    """How many tokens each document of a row has, in the order of the text; None where one goes on after another."""
    ids, lengths = ids_T.unique_consecutive(return_counts=True)
    return lengths if len(ids.unique()) == len(ids) else None


def attend_in_bands(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, runs: tuple[Run, ...], window: int | None
) -> Tensor:
    """softmax(q k / sqrt(H)) v [B, T, N, H] of runs, zeros elsewhere."""
    if torch.is_autocast_enabled("cpu"):
        q_BTNH, k_BSKH, v_BSKH = (x.to(torch.get_autocast_dtype("cpu")) for x in (q_BTNH, k_BSKH, v_BSKH))
    return _Bands.apply(q_BTNH, k_BSKH, v_BSKH, runs, window)


class _Bands(torch.autograd.Function):
    """The pieces put together; the gradient is the kernel's own of each, for which scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, runs: tuple[Run, ...], window: int | None
    ) -> Tensor:
        o_BTNH = torch.zeros_like(q_BTNH, memory_format=torch.contiguous_format)
        sum_BTN = torch.zeros(q_BTNH.shape[:3], dtype=_wide(q_BTNH.dtype))  # logarithms of sums of exponentials
        for run in runs:
            q, o, sums = _of_run(run.row, run.queries, k_BSKH.shape[2], q_BTNH, o_BTNH, sum_BTN[..., None])
            k, v = _of_run(run.row, run.keys, k_BSKH.shape[2], k_BSKH, v_BSKH)
            for first, *others in _pieces(q.shape[2], k.shape[2], window):
                o_block, sum_block = _computed(first, q, k, v)
                o_block = o_block.to(sum_block.dtype)
                for piece in others:
                    o_piece, sum_piece = _computed(piece, q, k, v)
                    # the last query of a block does not see the oldest keys
                    o_seen, sum_seen = o_block[:, :, : o_piece.shape[2]], sum_block[:, :, : o_piece.shape[2]]
                    o_seen.lerp_(o_piece.to(o_seen.dtype), torch.sigmoid(sum_piece - sum_seen)[..., None])
                    sum_seen.copy_(torch.logaddexp(sum_seen, sum_piece))
                o[:, :, first.queries], sums[:, :, first.queries, 0] = o_block, sum_block
        ctx.save_for_backward(q_BTNH, k_BSKH, v_BSKH, o_BTNH, sum_BTN)
        ctx.runs, ctx.window = runs, window
        return o_BTNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_BTNH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTNH, k_BSKH, v_BSKH, o_BTNH, sum_BTN = ctx.saved_tensors
        K, arrays = k_BSKH.shape[2], (q_BTNH, k_BSKH, v_BSKH)
        gradients = [torch.zeros(x.shape, dtype=sum_BTN.dtype) for x in arrays]
        for run in ctx.runs:
            do, q, o, sums = _of_run(run.row, run.queries, K, upstream_BTNH, q_BTNH, o_BTNH, sum_BTN[..., None])
            k, v = _of_run(run.row, run.keys, K, k_BSKH, v_BSKH)
            (dq,) = _of_run(run.row, run.queries, K, gradients[0])
            dk, dv = _of_run(run.row, run.keys, K, *gradients[1:])
            for piece in itertools.chain(*_pieces(q.shape[2], k.shape[2], ctx.window)):
                of_q, of_k, of_v = _differentiated(piece, do, q, k, v, o, sums)
                dq[:, :, piece.queries] += of_q
                dk[:, :, piece.keys] += of_k
                dv[:, :, piece.keys] += of_v
        return *(x.to(of.dtype) for x, of in zip(gradients, arrays, strict=True)), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


def _of_run(row: int, columns: slice, K: int, *arrays: Tensor) -> list[Tensor]:
    """[K, G, C, H] of each array [B, T, N, H]: views of these columns."""
    return [x[row, columns].unflatten(1, (K, -1)).permute(1, 2, 0, 3) for x in arrays]


def _computed(piece: _Piece, q_KGTH: Tensor, k_K1SH: Tensor, v_K1SH: Tensor) -> tuple[Tensor, Tensor]:
    """The output [K, G, C, H] of a piece, and the logarithms of sums [K, G, C]."""
    (q,), (k, v) = _cut(piece, piece.queries, q_KGTH), _cut(piece, piece.keys, k_K1SH, v_K1SH)
    o, sums = _kernel(q, k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1), 0.0, piece.is_causal)
    return (o.flip(2), sums.flip(2)) if piece.backwards else (o, sums)


def _differentiated(
    piece: _Piece, do: Tensor, q_KGTH: Tensor, k_K1SH: Tensor, v_K1SH: Tensor, o: Tensor, sums: Tensor
) -> list[Tensor]:
    """The gradients of a piece's queries, keys and values, from the whole output and its sums."""
    do, q, o, sums = _cut(piece, piece.queries, do, q_KGTH, o, sums)
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in _cut(piece, piece.keys, k_K1SH, v_K1SH))
    dq, dk, dv = _kernel_backward(do, q, k, v, o, sums[..., 0], 0.0, piece.is_causal)
    found = [dq, *(x.sum(1, keepdim=True, dtype=sums.dtype) for x in (dk, dv))]
    return [x.flip(2) for x in found] if piece.backwards else found


def _cut(piece: _Piece, columns: slice, *arrays: Tensor) -> list[Tensor]:
    """A piece's part of arrays [K, G, T, H], as the kernel is to see it."""
    parts = [x[:, :, columns] for x in arrays]
    return [x.flip(2) for x in parts] if piece.backwards else parts


def _pieces(queries: int, keys: int, window: int | None) -> Iterator[list[_Piece]]:
    """The pieces of each block of a run, whose last query is the last key; the first one is of all its queries."""
    past = keys - queries
    size = queries if window is None else min(window, COLUMNS)
    for begin in range(past, keys, size):
        end = min(begin + size, keys)
        oldest = 0 if window is None else max(begin - window + 1, 0)
        seen_by_all = 0 if window is None else max(end - window, 0)
        block = [_Piece(slice(begin - past, end - past), slice(begin, end), is_causal=True)]
        if seen_by_all < begin:
            block.append(_Piece(block[0].queries, slice(seen_by_all, begin)))
        if oldest < seen_by_all:
            some = slice(begin - past, end - 1 - past)
            block.append(_Piece(some, slice(oldest, seen_by_all), is_causal=True, backwards=True))
        yield block
