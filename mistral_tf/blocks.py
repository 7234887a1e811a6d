"""Long texts: attention by blocks of queries, each of which sees one span of keys.

With a window of W, T queries cost T (W + C) scores, C being the columns of a block, and the scores of one block are all
that is in memory at a time. Of a text without a window a block sees the keys up to its own last column. What is
computed of a block is an attention implementation's own: who sees whom is still a mask, of the span.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from .mask import mask
from .traces import sizes

COLUMNS = 512
"""The queries of a block."""
LONG = 1024
"""From how many columns on a text is taken by blocks, where these see fewer keys in all."""
PAYS = 0.8
"""The most scores of blocks, as a part of those of a whole mask, for which a text is cut."""
LOOPS = 8
"""Into how many loops over blocks a text without a window is cut: the keys of a loop are as many as its last block
sees."""
FIRST = 4
"""The same of the first blocks of a window, which reach beyond the text's begin, where they are so many."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
"""Queries [B, C, N, H], keys and values [B, S, K, H], a mask that broadcasts to [B, C, S], and the share of weights
that is dropped and the seed that says which, to outputs."""


class Blocks(NamedTuple):
    """A text in order, cut."""

    query_order_BT: Tensor
    """[B, T]: the orders of the queries, as in `Visibility`, those of padding first."""
    key_order_BS: Tensor
    """[B, S]: of the keys that any query sees, the last one beside the last query."""
    window: int | None
    documents: tuple[Tensor, Tensor] | None
    """[B, T] and [B, S]: the packed documents of queries and keys."""
    query_column_BT: Tensor
    """[B, T]: which column of the text is the query's."""
    key_column_BS: Tensor
    """[B, S]: which column is the key's."""
    in_order: Tensor
    """Whether the columns are taken as they stand, for which nothing is moved."""
    is_long: Tensor | None
    """Whether the text is taken by blocks, where its columns are not known when it is traced; None: it is."""
    programs: dict[tuple[Attend, float], Callable[..., Tensor]]
    """What layers that see alike have in common in a graph: the blocks, and their gradients, traced once."""


def cut(
    query_order_BT: Tensor,
    key_order_BS: Tensor,
    window: int | None,
    document_ids_BT: Tensor | None = None,
    *,
    always: bool = False,
) -> Blocks | None:
    """A text cut into blocks; None where it is short, or where they would not see fewer keys, but `always` is said."""
    T, S = sizes(query_order_BT)[1], sizes(key_order_BS)[1]
    are_known = isinstance(T, int) and isinstance(S, int)
    if are_known and (T <= COLUMNS or (not always and T < LONG)):
        return None
    seen = S if window is None else _least(S, T + window - 1)
    if are_known and not always and _scores(T, seen, window) > PAYS * T * S:
        return None
    in_order = _are_in_order(query_order_BT, key_order_BS)
    query_column_BT, key_column_BS = (
        tf.where(in_order, tf.range(size)[None], tf.argsort(x, axis=1, stable=True))
        for x, size in ((query_order_BT, T), (key_order_BS, S))
    )
    key_column_BS = key_column_BS[:, S - seen :]
    documents = None
    if document_ids_BT is not None:
        documents = _taken(document_ids_BT, query_column_BT), _taken(document_ids_BT, key_column_BS)
    return Blocks(
        _taken(query_order_BT, query_column_BT), _taken(key_order_BS, key_column_BS), window, documents,
        query_column_BT, key_column_BS, in_order, None if are_known else tf.convert_to_tensor(T >= LONG), {},
    )  # fmt: skip


def _are_in_order(query_order_BT: Tensor, key_order_BS: Tensor) -> Tensor:
    """Whether columns of real tokens are as far apart as their orders, counted from the last: a bool []."""
    T, S = sizes(query_order_BT)[1], sizes(key_order_BS)[1]
    every = tf.concat([query_order_BT, key_order_BS], axis=1)
    shift = every - tf.cast(tf.concat([tf.range(S - T, S), tf.range(S)], axis=0)[None], every.dtype)
    most = tf.reduce_max(tf.where(every >= 0, shift, shift.dtype.min), axis=1)
    least = tf.reduce_min(tf.where(every >= 0, shift, shift.dtype.max), axis=1)
    return tf.reduce_all(most <= least)


class _Loop(NamedTuple):
    """Blocks of queries that see as many keys; numbers, or tensors where the columns are not known."""

    begin: Any
    """The first block."""
    blocks: Any
    keys: slice | None
    """The columns that all of its blocks see; None: each has a span of its own, as long as its window."""


def _loops(queries: Any, keys: Any, window: int | None) -> list[_Loop]:
    """The loops over the blocks of a text, which is filled up to whole blocks in front."""
    count, columns = -(-queries // COLUMNS), _columns_of_keys(queries, keys, window)
    empty = 0 if window is None else columns // COLUMNS - -(-keys // COLUMNS)
    if not (isinstance(count, int) and isinstance(empty, int)):
        return [_Loop(0, count, slice(0, columns) if window is None else None)]
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


def _columns_of_keys(queries: Any, keys: Any, window: int | None) -> Any:
    """The columns of keys, filled up in front: as queries are, with a window to what their first block sees."""
    count = -(-queries // COLUMNS)
    return keys + count * COLUMNS - queries if window is None else (_span(window) - 1 + count) * COLUMNS


def _least(one: Any, other: Any) -> Any:
    are_known = isinstance(one, int) and isinstance(other, int)
    return min(one, other) if are_known else tf.minimum(one, other)


def attend_by_blocks(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    blocks: Blocks,
    attend: Attend,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The output [B, T, N, H], block after block, of which each draws what is dropped for itself.

    For gradients the scores and the masks of a block are not kept but computed again.
    """
    seed, told = seed if dropout else None, {"attend": attend, "dropout": dropout}
    if tf.executing_eagerly():
        return _attended(q_BTNH, k_BSKH, v_BSKH, blocks, seed, **told)
    key = attend, dropout
    if key not in blocks.programs:
        blocks.programs[key] = tf.function(functools.partial(_attended, **told), autograph=False)
    return blocks.programs[key](q_BTNH, k_BSKH, v_BSKH, blocks._replace(programs={}), seed)


def _attended(
    q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, blocks: Blocks, seed: Tensor | None,
    *, attend: Attend, dropout: float,
) -> Tensor:  # fmt: skip
    window = blocks.window
    T, seen = sizes(q_BTNH)[1], sizes(blocks.key_order_BS)[1]
    q_BTNH, k_BSKH, v_BSKH = tf.cond(
        blocks.in_order,
        lambda: (q_BTNH, k_BSKH[:, -seen:], v_BSKH[:, -seen:]),
        lambda: (_taken(q_BTNH, blocks.query_column_BT), *(_taken(x, blocks.key_column_BS) for x in (k_BSKH, v_BSKH))),
    )
    loops, columns = _loops(T, seen, window), _columns_of_keys(T, seen, window)
    of_queries, of_keys = (None, None) if blocks.documents is None else blocks.documents
    count = -(-T // COLUMNS)
    queries = [_in_blocks(x, count, fill) for x, fill in ((q_BTNH, 0), (blocks.query_order_BT, -1), (of_queries, 0))]
    queries.append(None if seed is None else tf.random.split(seed, count))
    keys = [
        _filled(x, columns, fill) for x, fill in ((k_BSKH, 0), (v_BSKH, 0), (blocks.key_order_BS, -1), (of_keys, 0))
    ]

    def of_block(floats: Sequence[Tensor], numbers: Sequence[Tensor | None]) -> Tensor:
        query_order_BC, of_query, seed, key_order_BS, of_key = numbers
        documents = None if of_query is None or of_key is None else (of_query, of_key)
        return attend(*floats, mask(query_order_BC, key_order_BS, window, documents), dropout, seed)

    outputs = []
    for loop in loops:
        q, *numbers = (None if x is None else x[loop.begin : loop.begin + loop.blocks] for x in queries)
        if loop.keys is None:
            spans = [None if x is None else _overlapping(x, loop.blocks, _span(window)) for x in keys]
        else:
            spans = [None if x is None else x[:, loop.keys] for x in keys]
        outputs.append(_in_turn(of_block, q, spans[:2], numbers, spans[2:], each_has_keys=loop.keys is None))
    o_BTNH = _joined(tf.concat(outputs, axis=0))[:, -T:]
    return tf.cond(
        blocks.in_order,
        lambda: o_BTNH,
        lambda: _taken(o_BTNH, tf.argsort(blocks.query_column_BT, axis=1)),
    )


def _in_turn(
    of_block: Callable[..., Tensor],
    q: Tensor,
    keys_values: Sequence[Tensor],
    query_numbers: Sequence[Tensor | None],
    key_numbers: Sequence[Tensor | None],
    *,
    each_has_keys: bool,
) -> Tensor:
    """The outputs of blocks [blocks, B, C, ...], one after another; what a gradient needs is computed again.

    Keys and values are those of each block, [blocks, B, S, ...], or the same [B, S, ...] of all.
    """

    def of_number(index: Tensor, q: Tensor, keys_values: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        def mine(x: Tensor | None, has_blocks: bool) -> Tensor | None:
            return x[index] if x is not None and has_blocks else x

        floats = [q[index], *(mine(x, each_has_keys) for x in keys_values)]
        return floats, [*(mine(x, True) for x in query_numbers), *(mine(x, each_has_keys) for x in key_numbers)]

    @tf.custom_gradient
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        count = sizes(q)[0]

        def forth(index: Tensor, outputs: tf.TensorArray) -> Any:
            return index + 1, outputs.write(index, of_block(*of_number(index, q, (k, v))))

        start = tf.constant(0), tf.TensorArray(q.dtype, count, element_shape=q.shape[1:])
        _, outputs = tf.while_loop(lambda index, _: index < count, forth, start, parallel_iterations=1)

        def gradient(upstream: Tensor) -> tuple[Tensor, ...]:
            def back(index: Tensor, of_queries: tf.TensorArray, *of_keys: Any) -> Any:
                floats, numbers = of_number(index, q, (k, v))
                with tf.GradientTape() as tape:
                    tape.watch(floats)
                    output = of_block(floats, numbers)
                of_query, *found = tape.gradient(output, floats, upstream[index])
                if each_has_keys:
                    of_keys = tuple(kept.write(index, x) for kept, x in zip(of_keys, found, strict=True))
                else:
                    of_keys = tuple(kept + x for kept, x in zip(of_keys, found, strict=True))
                return index + 1, of_queries.write(index, of_query), *of_keys

            if each_has_keys:
                of_keys = [tf.TensorArray(x.dtype, count, element_shape=x.shape[1:]) for x in (k, v)]
            else:
                of_keys = [tf.zeros_like(x) for x in (k, v)]
            start = tf.constant(0), tf.TensorArray(q.dtype, count, element_shape=q.shape[1:]), *of_keys
            _, of_queries, *of_keys = tf.while_loop(lambda index, *_: index < count, back, start, parallel_iterations=1)
            return of_queries.stack(), *(x.stack() if each_has_keys else x for x in of_keys)

        return outputs.stack(), gradient

    return run(q, *keys_values)


def _taken(x_BS: Tensor, column_BS: Tensor) -> Tensor:
    """These columns of each row."""
    return tf.gather(x_BS, column_BS, axis=1, batch_dims=1)


def _filled(x_BS: Tensor | None, size: Any, value: int) -> Tensor | None:
    """So many columns, the last ones x."""
    if x_BS is None:
        return None
    S = sizes(x_BS)[1]
    kept = _least(S, size)
    x_BS = x_BS[:, S - kept :]
    return tf.pad(x_BS, [[0, 0], [size - kept, 0], *[[0, 0]] * (len(x_BS.shape) - 2)], constant_values=value)


def _in_blocks(x_BT: Tensor | None, count: Any, value: int) -> Tensor | None:
    """[blocks, B, C]: x filled up to whole blocks."""
    if x_BT is None:
        return None
    x_BT = _filled(x_BT, count * COLUMNS, value)
    B, _, *rest = sizes(x_BT)
    x = tf.reshape(x_BT, [B, count, COLUMNS, *rest])
    return tf.transpose(x, [1, 0, *range(2, len(x.shape))])


def _joined(x: Tensor) -> Tensor:
    """[B, T] of blocks [blocks, B, C]."""
    count, B, C, *rest = sizes(x)
    return tf.reshape(tf.transpose(x, [1, 0, *range(2, len(x.shape))]), [B, count * C, *rest])


def _overlapping(x_BS: Tensor, count: Any, size: int) -> Tensor:
    """[blocks, B, keys]: the span of each of the last blocks, so many blocks of keys."""
    pieces = _in_blocks(x_BS, count + size - 1, 0)
    return tf.concat([pieces[number : number + count] for number in range(size)], axis=2)
