"""The KV cache as a value: what the past keys and values are, and in which slot each one lives.

A layer has R slots a row. The token of order o (its number among the real tokens of its row) lives in slot o mod R;
padding lives nowhere. With W + 1 slots a layer with a window of W never needs more, however long the text: the cache
is *rolling*. With capacity + 1 slots nothing is ever overwritten: it is *full*. One slot is always spare.

Window 3, R = 4, after five tokens a b c d e and after a sixth:

    slot    0 1 2 3        0 1 2 3
    order   4 1 2 3        4 5 2 3
    token   e b c d        e f c d       the next query has order 6 and sees 4 and 5; 2 and 3 are masked by order

In int8 a key or value [H] is kept as the codes round(x / s), halves to even, and the scale s = max|x| / 127 of its
token and head; a query sees codes * s. A token is rounded when it comes, so also for itself and those that come with
it: how a text is cut into calls changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..generation.cache_layout import cache_dtype, check_rollback, layer_slots


class KVCache(NamedTuple):
    """Keys and values of the past, one array per layer, and how many real tokens each row has."""

    keys: tuple[Array, ...]
    """L arrays [B, R, K, H], rotated."""
    values: tuple[Array, ...]
    """L arrays [B, R, K, H]."""
    length: Array
    """[B] int: real tokens so far."""
    capacity: int | None = None
    """The most real tokens a row may have, or None for no limit: layers then grow as far as their window."""
    dtype: str = "float64"
    """int8: what is kept are the values that codes and scales have, in float64."""

    @classmethod
    def allocate(
        cls,
        config: MistralConfig,
        batch_size: int,
        capacity: int | None = None,
        *,
        rolling: bool = True,
        lookback: int = 0,
        dtype: str = "float64",
    ) -> KVCache:
        """An empty cache; `lookback` tokens can be rolled back even where the cache rolls."""
        config = MistralConfig.of(config)
        slots = layer_slots(config, capacity, rolling=rolling, lookback=lookback)
        shapes = [(batch_size, r, config.num_key_value_heads, config.head_dim) for r in slots]
        return cls(
            tuple(np.zeros(s) for s in shapes),
            tuple(np.zeros(s) for s in shapes),
            np.zeros(batch_size, int),
            capacity,
            cache_dtype(dtype),
        )

    def kept(self, x_BTKH: Array) -> Array:
        """New keys or values as they are kept, and seen."""
        if self.dtype != "int8":
            return x_BTKH
        codes_BTKH, scale_BTK = int8_codes(x_BTKH)
        return codes_BTKH * scale_BTK[..., None]

    def update(self, layer: int, k_BTKH: Array, v_BTKH: Array, order_BT: Array, slots: int) -> tuple[Array, Array]:
        """The layer's keys and values after writing the new tokens into a ring of `slots`."""
        keys, values = (grown(x[layer], slots) for x in (self.keys, self.values))
        for row, order in enumerate(order_BT):
            for column in np.flatnonzero(order >= 0):
                keys[row, order[column] % slots] = k_BTKH[row, column]
                values[row, order[column] % slots] = v_BTKH[row, column]
        return keys, values

    def rollback(self, count_B: Array, config: MistralConfig) -> KVCache:
        """Forget the last `count_B` tokens of each row; they are overwritten later."""
        check_rollback(config, [k.shape[1] for k in self.keys], self.length.tolist(), np.asarray(count_B).tolist())
        return self._replace(length=self.length - count_B)

    def select_rows(self, row_B: Array) -> KVCache:
        """The cache of other rows: each may be left out, moved or there several times."""
        keys, values = (tuple(x[row_B] for x in xs) for xs in (self.keys, self.values))
        return self._replace(keys=keys, values=values, length=self.length[row_B])

    def grown(self, slots: tuple[int, ...], capacity: int) -> KVCache:
        """The cache with larger rings, as `cache_layout.grown_layout` allows."""
        keys, values = (tuple(map(grown, xs, slots)) for xs in (self.keys, self.values))
        return self._replace(keys=keys, values=values, capacity=capacity)


def int8_codes(x_BTKH: Array) -> tuple[Array, Array]:
    """Codes from -127 to 127 [B, T, K, H], and their scales [B, T, K], which are 0 for a vector of zeros."""
    scale_BTK = np.abs(x_BTKH).max(axis=-1) / 127
    codes_BTKH = np.rint(x_BTKH / np.where(scale_BTK == 0, 1, scale_BTK)[..., None])
    return codes_BTKH, scale_BTK


def grown(x_BRKH: Array, slots: int) -> Array:
    """A copy with zeros in the slots that are new."""
    return np.pad(x_BRKH, ((0, 0), (0, slots - x_BRKH.shape[1]), (0, 0), (0, 0)))


def slot_order(length_B: Array, slots: int) -> Array:
    """[B, R]: the order of the token in each slot: the newest o < length with o mod R = slot, else -1."""
    newest = length_B[:, None] - 1
    order = newest - (newest - np.arange(slots)) % slots
    return np.maximum(order, -1)
