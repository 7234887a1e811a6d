"""The KV cache as a value: it goes into a call and the next one comes out; full or rolling.

The layout is specified and drawn in `mistral_core.reference.cache`: the token of order o lives in slot o mod R.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig
from mistral_core.generation.cache_layout import check_rollback, cropped, grown_slots, layer_slots, overwrites_visible


class KVCache(tf.experimental.ExtensionType):
    """Keys and values of the past: a value, into a call and out of it again.

    An extension type, so tf.function takes and returns it; its capacity is static.
    """

    keys: tuple[Tensor, ...]
    """L arrays [B, R, K, H], rotated."""
    values: tuple[Tensor, ...]
    """L arrays [B, R, K, H]."""
    length: Tensor
    """[B] int32: real tokens so far."""
    capacity: Optional[int] = None  # noqa: UP045  (ExtensionType knows no other spelling)
    """The most real tokens a row may have; None: layers grow as far as their window."""

    @classmethod
    def allocate(
        cls,
        config: MistralConfig,
        batch_size: int,
        capacity: int | None = None,
        *,
        rolling: bool = True,
        lookback: int = 0,
        dtype: Any = tf.float32,
    ) -> KVCache:
        """An empty cache for `capacity` tokens a row; without one it grows with the text, as far as each window.

        `rolling=False` keeps every token of windowed layers too; the last `lookback` tokens can always be rolled back.
        """
        config = MistralConfig.of(config)
        shapes = [
            (batch_size, slots, config.num_key_value_heads, config.head_dim)
            for slots in layer_slots(config, capacity, rolling=rolling, lookback=lookback)
        ]
        return cls(
            tuple(tf.zeros(shape, dtype) for shape in shapes),
            tuple(tf.zeros(shape, dtype) for shape in shapes),
            tf.zeros([batch_size], tf.int32),
            capacity,
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and length, as one layer reads them."""
        return self.keys[index], self.values[index], self.length

    def advanced(self, kept: Iterable[tuple[Tensor, Tensor]], order_BT: Tensor) -> KVCache:
        """The cache after a call: what each layer keeps now, and as many tokens more as have an order."""
        keys, values = zip(*kept, strict=True)
        length_B = self.length + tf.reduce_sum(tf.cast(order_BT >= 0, tf.int32), 1)
        return KVCache(keys, values, length_B, self.capacity)

    def rollback(self, count_B: Tensor, config: MistralConfig) -> KVCache:
        """Forget the last `count_B` [B] tokens of each row.

        Raises InputError where a rolling layer no longer has what the window would show.
        """
        count_B = tf.cast(count_B, tf.int32)
        if tf.executing_eagerly():
            length, count = self.length.numpy().tolist(), count_B.numpy().tolist()
            check_rollback(config, [k.shape[1] for k in self.keys], length, count)
        return KVCache(self.keys, self.values, self.length - count_B, self.capacity)

    def select_rows(self, row_B: Tensor) -> KVCache:
        """A copy of other rows: each may be left out, moved or there several times."""
        keys, values = (tuple(tf.gather(x, row_B) for x in xs) for xs in (self.keys, self.values))
        return KVCache(keys, values, tf.gather(self.length, row_B), self.capacity)

    def grown(self, slots: tuple[int, ...], capacity: int) -> KVCache:
        """A copy with larger rings, as `cache_layout.grown_layout` allows."""
        keys, values = (tuple(map(_grown, xs, slots)) for xs in (self.keys, self.values))
        return KVCache(keys, values, self.length, capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many real tokens the longest row has."""
        return max(self.length.numpy().tolist(), default=0)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most real tokens a row may have; -1 where the cache grows."""
        return -1 if self.capacity is None else self.capacity

    def crop(self, max_length: int) -> KVCache:
        """The cache of each row's first tokens, or without the last so many if negative; use what is returned.

        Raises InputError where it has rolled on.
        """
        back = cropped([k.shape[1] for k in self.keys], self.length.numpy().tolist(), max_length)
        return KVCache(self.keys, self.values, self.length - tf.constant(back, tf.int32), self.capacity)

    def reorder_cache(self, beam_idx: Tensor) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> KVCache:
        """The cache with each row so many times; use what is returned."""
        return self.select_rows(tf.repeat(tf.range(len(self.length)), repeats))

    def batch_select_indices(self, indices: Tensor) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(indices)


def _grown(x_BRKH: Tensor, slots: int) -> Tensor:
    return tf.pad(x_BRKH, ((0, 0), (0, slots - x_BRKH.shape[1]), (0, 0), (0, 0)))


def slot_order(length_B: Tensor, slots: int) -> Tensor:
    """[B, R]: the order of the token in each slot, -1 where there is none."""
    newest = length_B[:, None] - 1
    order = newest - (newest - tf.range(slots)) % slots
    return tf.maximum(order, -1)


def remember(
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    order_BT: Tensor,
    *,
    past: tuple[Tensor, Tensor, Tensor] | None,
    window: int | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """What the new tokens attend to, and what is kept of it.

    `past` is (keys [B, R, K, H], values [B, R, K, H], length [B]) or None; its dtype may be another than the new
    ones'. Returns keys, values [B, S, K, H] and order [B, S] of what is seen, in the dtype of the new ones, and the
    layer's next keys and values, None without a past.
    """
    if past is None:
        return k_BTKH, v_BTKH, order_BT, None
    keys, values, length_B = past
    T, past_slots = order_BT.shape[1], keys.shape[1]
    slots = grown_slots(past_slots, T, window, capacity)
    next_length_B = length_B + tf.reduce_sum(tf.cast(order_BT >= 0, tf.int32), 1)
    fresh = past_slots == 1  # only the spare slot: nothing is kept yet
    beside = not fresh and overwrites_visible(slots, past_slots, T, window, capacity)
    if beside:
        seen = (
            tf.concat([tf.cast(keys, k_BTKH.dtype), k_BTKH], axis=1),
            tf.concat([tf.cast(values, v_BTKH.dtype), v_BTKH], axis=1),
        )
        seen_order_BS = tf.concat([slot_order(length_B, past_slots), order_BT], axis=1)
    # padding, and what a long chunk would overwrite at once, goes to the spare slot
    fits_BT = (order_BT >= 0) & (order_BT > next_length_B[:, None] - slots)
    slot_BT = tf.where(fits_BT, order_BT % slots, next_length_B[:, None] % slots)
    kept = write(keys, k_BTKH, slot_BT, slots), write(values, v_BTKH, slot_BT, slots)
    if fresh:
        seen, seen_order_BS = (k_BTKH, v_BTKH), order_BT
    elif not beside:
        seen = tf.cast(kept[0], k_BTKH.dtype), tf.cast(kept[1], v_BTKH.dtype)
        seen_order_BS = slot_order(next_length_B, slots)
    return *seen, seen_order_BS, kept


def write(x_BRKH: Tensor, new_BTKH: Tensor, slot_BT: Tensor, slots: int) -> Tensor:
    """The new tokens put into their slots of a ring grown to `slots`."""
    if slots > x_BRKH.shape[1]:
        x_BRKH = _grown(x_BRKH, slots)
    row_BT = tf.broadcast_to(tf.range(tf.shape(slot_BT)[0])[:, None], tf.shape(slot_BT))
    return tf.tensor_scatter_nd_update(x_BRKH, tf.stack([row_BT, slot_BT], -1), tf.cast(new_BTKH, x_BRKH.dtype))
