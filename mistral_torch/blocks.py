"""Long texts: attention by blocks of queries, each of which sees one span of keys.

With a window of W, T queries cost T (W + C) scores, C being the columns of a block, and the scores of one block are all
that is in memory at a time. Of a text without a window a block sees the keys up to its own last column. What is
computed of a block is an attention implementation's own: who sees whom is still a mask, of the span.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .cache import has_values, is_mapped
from .mask import mask

COLUMNS = 512
"""The queries of a block."""
LONG = 1024
"""From how many columns on a fused kernel takes a text by blocks, where these see fewer keys in all."""
PAYS = 0.8
"""The most scores of blocks, as a part of those of a whole mask, for which a text is cut."""
ANY = 2**31
"""More columns than a text has."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries [B, C, N, H], keys and values [B, S, K, H] and a mask that broadcasts to [B, C, S], to outputs."""


class _Span(NamedTuple):
    """A block's queries and the keys that they see, as columns from the first to before the last."""

    query_begin: int
    query_end: int
    key_begin: int
    key_end: int

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and keys."""
        return self.query_end - self.query_begin, self.key_end - self.key_begin


class Blocks(NamedTuple):
    """A text in order, cut."""

    query_order_BT: Tensor
    """[B, T]: the orders of the queries, as in `Visibility`, those of padding first."""
    key_order_BS: Tensor
    """[B, S]: of the keys that any query sees, the last one beside the last query."""
    window: int | None
    documents: tuple[Tensor, Tensor] | None
    """[B, T] and [B, S]: the packed documents of queries and keys."""
    query_column_BT: Tensor | None
    """[B, T]: which column of the text is the query's; None: it stands there already."""
    key_column_BS: Tensor | None
    """[B, S]: which column is the key's."""
    spans: tuple[_Span, ...]
    masks: Mapping[tuple[int, int], Tensor] = {}
    """[1, C, S] bool of blocks of these sizes, where all rows see alike, so that blocks of one size do."""


def cut(
    query_order_BT: Tensor,
    key_order_BS: Tensor,
    window: int | None,
    document_ids_BT: Tensor | None = None,
    *,
    always: bool = False,
) -> Blocks | None:
    """A text cut into blocks; None where it is short, or where they would not see fewer keys, but `always` is said.

    Where the numbers of columns are not known, as for a program that is compiled for any, nothing is cut.
    """
    T, S = query_order_BT.shape[1], key_order_BS.shape[1]
    if not _is_long(T, S, COLUMNS + 1 if always else max(LONG, COLUMNS + 1)):
        return None
    seen = S if window is None else min(S, T + window - 1)
    spans = tuple(_spans(T, seen, window))
    if not always and sum(math.prod(span.sizes) for span in spans) > PAYS * T * S:
        return None
    in_order, all_real = looked(query_order_BT, key_order_BS)
    query_column_BT = key_column_BS = None
    if in_order:
        query_order_BT, key_order_BS = query_order_BT, key_order_BS[:, S - seen :]
    else:
        query_column_BT = query_order_BT.argsort(dim=1, stable=True)
        key_column_BS = key_order_BS.argsort(dim=1, stable=True)[:, S - seen :]
        query_order_BT, key_order_BS = query_order_BT.gather(1, query_column_BT), key_order_BS.gather(1, key_column_BS)
    documents = None
    if document_ids_BT is not None:
        queries, keys = document_ids_BT, document_ids_BT[:, S - seen :]
        if query_column_BT is not None and key_column_BS is not None:
            queries, keys = document_ids_BT.gather(1, query_column_BT), document_ids_BT.gather(1, key_column_BS)
        documents = queries, keys
    # less to read, for masks are made of them for each layer
    query_order_BT, key_order_BS = query_order_BT.to(torch.int32), key_order_BS.to(torch.int32)
    blocks = Blocks(query_order_BT, key_order_BS, window, documents, query_column_BT, key_column_BS, spans)
    if in_order and all_real and documents is None and window is not None:
        of_row = blocks._replace(query_order_BT=query_order_BT[:1], key_order_BS=key_order_BS[:1])
        # in each the last key is the last query's
        return blocks._replace(masks={span.sizes: _mask(of_row, span) for span in {s.sizes: s for s in spans}.values()})
    return blocks


def _is_long(queries: int, keys: int, least: int) -> bool:
    """Whether a text has so many columns, as far as is known where it is compiled: a dynamic number stays dynamic."""
    if not torch.compiler.is_dynamo_compiling():
        return isinstance(queries, int) and isinstance(keys, int) and queries >= least
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, loaded when compiling

    # of a number that may be any, it is not known that it is below what no text has
    return all(map(statically_known_true, (queries >= least, queries < ANY, keys < ANY)))


def _spans(queries: int, keys: int, window: int | None) -> list[_Span]:
    """The blocks of a text whose last query is the last key."""
    found = []
    for begin in range(0, queries, COLUMNS):
        end = min(begin + COLUMNS, queries)
        first = 0 if window is None else begin + keys - queries - window + 1
        found.append(_Span(begin, end, max(first, 0), end + keys - queries))
    return found


def looked(query_order_BT: Tensor, key_order_BS: Tensor) -> tuple[bool, bool]:
    """Whether columns of real tokens are as far apart as their orders, counted from the last, and whether all are real.

    No and no where there are no values to look at.
    """
    if not has_values(query_order_BT):
        return False, False
    every = query_order_BT if query_order_BT is key_order_BS else torch.cat([query_order_BT, key_order_BS], 1)
    T, S = query_order_BT.shape[1], key_order_BS.shape[1]
    column = torch.arange(S, device=every.device)
    column = column if query_order_BT is key_order_BS else torch.cat([column[S - T :], column])
    real, shift = every >= 0, every - column
    most = torch.where(real, shift, torch.iinfo(shift.dtype).min).amax(1)
    least = torch.where(real, shift, torch.iinfo(shift.dtype).max).amin(1)
    in_order, all_real = torch.stack([(most <= least).all(), real.all()]).tolist()
    return in_order, all_real


def _mask(blocks: Blocks, block: _Span) -> Tensor:
    """[B, C, S] bool: which keys of its span the queries of a block see."""
    queries, keys = slice(block.query_begin, block.query_end), slice(block.key_begin, block.key_end)
    documents = None
    if blocks.documents is not None:
        of_queries, of_keys = blocks.documents
        documents = of_queries[:, queries], of_keys[:, keys]
    return mask(blocks.query_order_BT[:, queries], blocks.key_order_BS[:, keys], blocks.window, documents)


def attend_by_blocks(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    blocks: Blocks,
    attend: Attend,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The output [B, T, N, H], block after block, of which each draws what is dropped for itself.

    For gradients the scores and the masks of a block are not kept but computed again. `dropout` is the share of weights
    that `attend` drops.
    """
    if blocks.query_column_BT is None or blocks.key_column_BS is None:
        seen = blocks.key_order_BS.shape[1]
        k_BSKH, v_BSKH = k_BSKH[:, -seen:], v_BSKH[:, -seen:]
    else:
        q_BTNH = _columns(q_BTNH, blocks.query_column_BT)
        k_BSKH, v_BSKH = (_columns(x, blocks.key_column_BS) for x in (k_BSKH, v_BSKH))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTNH, k_BSKH, v_BSKH))
    # as what is added to scores, kernels keep a shared mask for gradients as it is; none of a CPU drops weights
    keeps_scores = bool(dropout) and q_BTNH.device.type == "cpu"
    added = {sizes: _added(visible, q_BTNH.dtype) for sizes, visible in blocks.masks.items()}

    def of_block(q_BCNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, span: _Span) -> Tensor:
        return attend(q_BCNH, k_BSKH, v_BSKH, added[span.sizes] if added else _mask(blocks, span))

    run: Callable[..., Tensor] = of_block
    if learns and (keeps_scores or not added) and not is_mapped():
        run = functools.partial(checkpoint, of_block, use_reentrant=False)
    queries = q_BTNH.split(COLUMNS, dim=1)
    keys, values = (_of_spans(x, blocks.spans, learns) for x in (k_BSKH, v_BSKH))
    o_BTNH = torch.cat([run(*each) for each in zip(queries, keys, values, blocks.spans, strict=True)], dim=1)
    if blocks.query_column_BT is None:
        return o_BTNH
    return _columns(o_BTNH, blocks.query_column_BT.argsort(dim=1))


def _added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, -torch.inf)


def _columns(x_BSKH: Tensor, column_BS: Tensor) -> Tensor:
    """These columns of each row."""
    B, S = x_BSKH.shape[:2]
    row_B1 = torch.arange(B, device=x_BSKH.device)[:, None]
    chosen = x_BSKH.flatten(0, 1).index_select(0, (column_BS + S * row_B1).flatten())
    return chosen.unflatten(0, column_BS.shape)


def _of_spans(x_BSKH: Tensor, spans: tuple[_Span, ...], learns: bool) -> list[Tensor]:
    """The keys or values of each span.

    To differentiate they are cut once and put together, for the gradient of a slice is as long as the whole text.
    """
    if not learns:
        return [x_BSKH[:, block.key_begin : block.key_end] for block in spans]
    edges = sorted({0, x_BSKH.shape[1]} | {edge for block in spans for edge in block[2:]})
    pieces = x_BSKH.split([end - begin for begin, end in itertools.pairwise(edges)], dim=1)
    at = {edge: number for number, edge in enumerate(edges)}
    return [torch.cat(pieces[at[block.key_begin] : at[block.key_end]], dim=1) for block in spans]
