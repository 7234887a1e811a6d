"""Long texts: attention by blocks of queries, each of which sees one span of keys.

With a window of W, T queries cost T (W + C) scores, C being the columns of a block, and the scores of one block are all
that is in memory at a time. Of a text without a window a block sees the keys up to its own last column. What is
computed of a block is an attention implementation's own: who sees whom is still a mask, of the span.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .mask import mask
from .programs import in_one_program

COLUMNS = 512
"""The queries of a block."""
LONG = 1024
"""From how many columns on a fused kernel takes a text by blocks, where these see fewer keys in all."""
PAYS = 0.8
"""The most scores of blocks, as a part of those of a whole mask, for which a text is cut."""
LOOPS = 8
"""Into how many loops over blocks a text without a window is cut: the keys of a loop are one program's, so as many as
its last block sees."""
FIRST = 4
"""The same of the first blocks of a window, which reach beyond the text's begin, where they are so many."""

Attend = Callable[[Array, Array, Array, Array, float, Array | None], Array]
"""Queries [B, C, N, H], keys and values [B, S, K, H], a mask that broadcasts to [B, C, S], and the share of weights
that is dropped and the key that says which, to outputs."""


class Blocks(NamedTuple):
    """A text in order, cut."""

    query_order_BT: Array
    """[B, T]: the orders of the queries, as in `Visibility`, those of padding first."""
    key_order_BS: Array
    """[B, S]: of the keys that any query sees, the last one beside the last query."""
    window: int | None
    documents: tuple[Array, Array] | None
    """[B, T] and [B, S]: the packed documents of queries and keys."""
    query_column_BT: Array
    """[B, T]: which column of the text is the query's."""
    key_column_BS: Array
    """[B, S]: which column is the key's."""
    in_order: Array
    """Whether the columns are taken as they stand, for which nothing is moved."""


def cut(
    query_order_BT: Array,
    key_order_BS: Array,
    window: int | None,
    document_ids_BT: Array | None = None,
    *,
    always: bool = False,
) -> Blocks | None:
    """A text cut into blocks; None where it is short, or where they would not see fewer keys, but `always` is said.

    Where the numbers of columns are not known, as for a program that is exported for any, nothing is cut.
    """
    T, S = query_order_BT.shape[1], key_order_BS.shape[1]
    if not isinstance(T, int) or not isinstance(S, int) or T <= COLUMNS or (not always and T < LONG):
        return None
    seen = S if window is None else min(S, T + window - 1)
    if not always and _scores(T, seen, window) > PAYS * T * S:
        return None
    in_order = _are_in_order(query_order_BT, key_order_BS)
    query_column_BT, key_column_BS = (
        jnp.where(in_order, jnp.arange(x.shape[1])[None], x.argsort(axis=1, stable=True))
        for x in (query_order_BT, key_order_BS)
    )
    key_column_BS = key_column_BS[:, S - seen :]
    documents = None
    if document_ids_BT is not None:
        documents = _taken(document_ids_BT, query_column_BT), _taken(document_ids_BT, key_column_BS)
    return Blocks(
        _taken(query_order_BT, query_column_BT), _taken(key_order_BS, key_column_BS), window, documents,
        query_column_BT, key_column_BS, in_order,
    )  # fmt: skip


@in_one_program
def _are_in_order(query_order_BT: Array, key_order_BS: Array) -> Array:
    """Whether columns of real tokens are as far apart as their orders, counted from the last: a bool []."""
    T, S = query_order_BT.shape[1], key_order_BS.shape[1]
    every = jnp.concatenate([query_order_BT, key_order_BS], axis=1)
    shift = every - jnp.concatenate([jnp.arange(S - T, S), jnp.arange(S)])[None].astype(every.dtype)
    info = jnp.iinfo(shift.dtype)
    most, least = jnp.where(every >= 0, shift, info.min).max(1), jnp.where(every >= 0, shift, info.max).min(1)
    return (most <= least).all()


class _Loop(NamedTuple):
    """Blocks of queries that see as many keys."""

    begin: int
    """The first block."""
    blocks: int
    keys: slice | None
    """The columns that all of its blocks see; None: each has a span of its own, as long as its window."""


def _loops(queries: int, keys: int, window: int | None) -> list[_Loop]:
    """The loops over the blocks of a text, which is filled up to whole blocks in front."""
    count, columns = -(-queries // COLUMNS), _columns_of_keys(queries, keys, window)
    empty = 0 if window is None else columns // COLUMNS - -(-keys // COLUMNS)
    first = count if window is None else min(empty, count) if empty >= FIRST else 0
    size = max(-(-first // (LOOPS if window is None else FIRST)), 1)
    loops = [
        _Loop(begin, end - begin, slice(empty * COLUMNS, columns - (count - end) * COLUMNS))
        for begin in range(0, first, size)
        for end in [min(begin + size, first)]
    ]
    return [*loops, _Loop(first, count - first, None)] if first < count else loops


def _scores(queries: int, keys: int, window: int | None) -> int:
    """How many scores the blocks of a text have."""
    return sum(
        loop.blocks * COLUMNS * (_span(window) * COLUMNS if loop.keys is None else loop.keys.stop - loop.keys.start)
        for loop in _loops(queries, keys, window)
    )


def _span(window: int | None) -> int:
    """How many blocks of keys one block of queries sees that has a span of its own."""
    return 1 if window is None else -(-(window - 1) // COLUMNS) + 1


def _columns_of_keys(queries: int, keys: int, window: int | None) -> int:
    """The columns of keys, filled up in front: as queries are, with a window to what their first block sees."""
    count = -(-queries // COLUMNS)
    return keys + count * COLUMNS - queries if window is None else (_span(window) - 1 + count) * COLUMNS


def attend_by_blocks(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    blocks: Blocks,
    attend: Attend,
    *,
    dropout: float = 0.0,
    rngs: Array | None = None,
) -> Array:
    """The output [B, T, N, H], block after block, of which each draws what is dropped for itself.

    For gradients the scores and the masks of a block are not kept but computed again.
    """
    told = {"window": blocks.window, "attend": attend, "dropout": dropout}
    return _attend_by_blocks(q_BTNH, k_BSKH, v_BSKH, blocks._replace(window=None), rngs if dropout else None, **told)


@functools.partial(in_one_program, static_argnames=("window", "attend", "dropout"))
def _attend_by_blocks(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, blocks: Blocks, rngs: Array | None,
    *, window: int | None, attend: Attend, dropout: float,
) -> Array:  # fmt: skip
    T, seen = q_BTNH.shape[1], blocks.key_order_BS.shape[1]
    q_BTNH, k_BSKH, v_BSKH = jax.lax.cond(
        blocks.in_order,
        lambda q, k, v: (q, k[:, -seen:], v[:, -seen:]),
        lambda q, k, v: (
            _taken(q, blocks.query_column_BT), *(_taken(x, blocks.key_column_BS) for x in (k, v))
        ),
        q_BTNH, k_BSKH, v_BSKH,
    )  # fmt: skip
    loops, columns = _loops(T, seen, window), _columns_of_keys(T, seen, window)
    of_queries, of_keys = (None, None) if blocks.documents is None else blocks.documents
    count = -(-T // COLUMNS)
    queries = [_in_blocks(x, count, fill) for x, fill in ((q_BTNH, 0), (blocks.query_order_BT, -1), (of_queries, 0))]
    queries.append(None if rngs is None else jax.random.split(rngs, count))
    keys = [
        _filled(x, columns, fill) for x, fill in ((k_BSKH, 0), (v_BSKH, 0), (blocks.key_order_BS, -1), (of_keys, 0))
    ]

    @jax.checkpoint
    def of_block(of_queries: list[Array | None], of_keys: list[Array | None]) -> Array:
        (q, query_order_BC, of_query, rngs), (k, v, key_order_BS, of_key) = of_queries, of_keys
        documents = None if of_query is None or of_key is None else (of_query, of_key)
        return attend(q, k, v, mask(query_order_BC, key_order_BS, window, documents), dropout, rngs)

    outputs = []
    for loop in loops:
        some = [None if x is None else x[loop.begin : loop.begin + loop.blocks] for x in queries]
        if loop.keys is None:
            spans = [None if x is None else _overlapping(x, loop.blocks, _span(window)) for x in keys]
            outputs.append(jax.lax.map(lambda each: of_block(*each), (some, spans)))
        else:
            spans = [None if x is None else x[:, loop.keys] for x in keys]
            outputs.append(jax.lax.map(functools.partial(of_block, of_keys=spans), some))
    o_BTNH = jnp.moveaxis(jnp.concatenate(outputs), 0, 1)
    o_BTNH = o_BTNH.reshape(o_BTNH.shape[0], -1, *o_BTNH.shape[3:])[:, -T:]
    return jax.lax.cond(
        blocks.in_order, lambda o: o, lambda o: _taken(o, blocks.query_column_BT.argsort(axis=1)), o_BTNH
    )


def _taken(x_BS: Array, column_BS: Array) -> Array:
    """These columns of each row."""
    return jnp.take_along_axis(x_BS, jnp.expand_dims(column_BS, range(2, x_BS.ndim)), axis=1)


def _filled(x_BS: Array | None, size: int, value: int) -> Array | None:
    """So many columns, the last ones x."""
    if x_BS is None:
        return None
    x_BS = x_BS[:, max(x_BS.shape[1] - size, 0) :]
    return jnp.pad(x_BS, ((0, 0), (size - x_BS.shape[1], 0), *((0, 0),) * (x_BS.ndim - 2)), constant_values=value)


def _in_blocks(x_BT: Array | None, count: int, value: int) -> Array | None:
    """[blocks, B, C]: x filled up to whole blocks."""
    if x_BT is None:
        return None
    x_BT = _filled(x_BT, count * COLUMNS, value)
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], count, COLUMNS, *x_BT.shape[2:]), 1, 0)


def _overlapping(x_BS: Array, count: int, size: int) -> Array:
    """[blocks, B, keys]: the span of each of the last blocks, so many blocks of keys, whose gradient is no longer."""
    pieces = _in_blocks(x_BS, count + size - 1, 0)
    return jnp.concatenate([pieces[number : number + count] for number in range(size)], axis=2)
