"""The KV cache as a value: it goes into a call and the next one comes out; full or rolling.

The layout is specified and drawn in `mistral_core.reference.cache`: the token of order o lives in slot o mod R.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import tensorflow as tf
from tensorflow import Tensor

from mistral_core import MistralConfig
from mistral_core.generation.cache_layout import (
    cache_dtype,
    check_rollback,
    cropped,
    grown_slots,
    layer_slots,
    overwrites_visible,
)

from .traces import sizes

LARGEST_CODE = 127
"""The code of a vector's largest number, in int8."""


class KVCache(tf.experimental.ExtensionType):
    """Keys and values of the past: a value, into a call and out of it again.

    An extension type, so tf.function takes and returns it; its capacity is static.
    """

    keys: tuple[Tensor, ...]
    """L arrays [B, R, K, H], rotated; in int8 their codes."""
    values: tuple[Tensor, ...]
    """L arrays [B, R, K, H]; in int8 their codes."""
    length: Tensor
    """[B] int32: real tokens so far."""
    capacity: Optional[int] = None  # noqa: UP045  (ExtensionType knows no other spelling)
    """The most real tokens a row may have; None: layers grow as far as their window."""
    key_scales: tuple[Tensor, ...] = ()
    """L arrays [B, R, K] float32, by which the codes of keys are multiplied; none where keys are floats."""
    value_scales: tuple[Tensor, ...] = ()
    """L arrays [B, R, K] float32, by which the codes of values are multiplied."""

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
        `dtype` may be int8: codes, and a scale for each token and key/value head; no gradient flows through them.
        Raises ConfigError for a dtype that no cache can have.
        """
        config = MistralConfig.of(config)
        shapes = [
            (batch_size, slots, config.num_key_value_heads, config.head_dim)
            for slots in layer_slots(config, capacity, rolling=rolling, lookback=lookback)
        ]
        kind = tf.as_dtype(cache_dtype(dtype))
        scaled = [shape[:-1] for shape in shapes] if kind == tf.int8 else []
        return cls(
            tuple(tf.zeros(shape, kind) for shape in shapes),
            tuple(tf.zeros(shape, kind) for shape in shapes),
            tf.zeros([batch_size], tf.int32),
            capacity,
            tuple(tf.zeros(shape) for shape in scaled),
            tuple(tf.zeros(shape) for shape in scaled),
        )

    @property
    def dtype(self) -> Any:
        """What keys and values are kept in."""
        return self.keys[0].dtype

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """Keys, values, the scales of their codes if they have some, and length, as one layer reads them."""
        return *(x[index] for x in self._kept() if x), self.length

    def _kept(self) -> tuple[tuple[Tensor, ...], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales

    def _with(self, kept: Iterable[Iterable[Tensor]], length_B: Tensor, capacity: int | None) -> KVCache:
        keys, values, *scales = map(tuple, kept)
        return KVCache(keys, values, length_B, capacity, *scales)

    def advanced(self, kept: Iterable[tuple[Tensor, ...]], order_BT: Tensor) -> KVCache:
        """The cache after a call: what each layer keeps now, and as many tokens more as have an order."""
        length_B = self.length + tf.reduce_sum(tf.cast(order_BT >= 0, tf.int32), 1)
        return self._with(zip(*kept, strict=True), length_B, self.capacity)

    def rollback(self, count_B: Tensor, config: MistralConfig) -> KVCache:
        """Forget the last `count_B` [B] tokens of each row.

        Raises InputError where a rolling layer no longer has what the window would show.
        """
        count_B = tf.cast(count_B, tf.int32)
        if tf.executing_eagerly():
            length, count = self.length.numpy().tolist(), count_B.numpy().tolist()
            check_rollback(config, [k.shape[1] for k in self.keys], length, count)
        return self._with(self._kept(), self.length - count_B, self.capacity)

    def select_rows(self, row_B: Tensor) -> KVCache:
        """A copy of other rows: each may be left out, moved or there several times."""
        kept = ([tf.gather(x, row_B) for x in xs] for xs in self._kept())
        return self._with(kept, tf.gather(self.length, row_B), self.capacity)

    def grown(self, slots: tuple[int, ...], capacity: int) -> KVCache:
        """A copy with larger rings, as `cache_layout.grown_layout` allows."""
        return self._with((map(_grown, xs, slots) for xs in self._kept()), self.length, capacity)

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
        return self._with(self._kept(), self.length - tf.constant(back, tf.int32), self.capacity)

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
    if slots == x_BRKH.shape[1] and tf.executing_eagerly():
        # tf.pad would give the tensor itself, and a step in C writes into what it is given
        return tf.raw_ops.DeepCopy(x=x_BRKH)
    return tf.pad(x_BRKH, ((0, 0), (0, slots - x_BRKH.shape[1]), *((0, 0),) * (len(x_BRKH.shape) - 2)))


def slot_order(length_B: Tensor, slots: int) -> Tensor:
    """[B, R]: the order of the token in each slot, -1 where there is none."""
    newest = tf.expand_dims(length_B, 1) - 1
    order = newest - (newest - tf.range(slots)) % slots
    return tf.maximum(order, -1)


def int8_codes(x_BTKH: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, T, K, H] int8 and scales [B, T, K] float32 whose product is nearest to x: max|x| over H has code 127.

    Halves go to the even code, and a vector of zeros has scale 0 and codes 0.
    """
    x_BTKH = tf.cast(tf.stop_gradient(x_BTKH), tf.float32)
    scale_BTK = tf.reduce_max(tf.abs(x_BTKH), -1) / LARGEST_CODE
    codes_BTKH = tf.round(x_BTKH / tf.expand_dims(tf.where(scale_BTK == 0, 1.0, scale_BTK), -1))
    return tf.cast(codes_BTKH, tf.int8), scale_BTK


def stored(k_BTKH: Tensor, v_BTKH: Tensor, dtype: Any) -> tuple[Tensor, ...]:
    """Keys and values as a cache of this dtype keeps them, in int8 their codes and then their scales."""
    if dtype != tf.int8:
        return tf.cast(k_BTKH, dtype), tf.cast(v_BTKH, dtype)
    (keys, key_scales), (values, value_scales) = int8_codes(k_BTKH), int8_codes(v_BTKH)
    return keys, values, key_scales, value_scales


def restored(kept: Iterable[Tensor], dtype: Any) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, K, H] in the dtype of the model, of what a cache keeps."""
    keys, values, *scales = kept
    if scales:
        pairs = zip((keys, values), scales, strict=True)
        keys, values = (tf.cast(codes, tf.float32) * tf.expand_dims(scale, -1) for codes, scale in pairs)
    return tf.cast(keys, dtype), tf.cast(values, dtype)


class Place(NamedTuple):
    """Where the new tokens of a call go in rings of one size, and what the queries of that layer then see."""

    slots: int
    """R of the rings after the call."""
    slot_BT: Tensor
    """[B, T]: the slot of each new token."""
    order_BS: Tensor
    """[B, S]: the order of each key that is seen."""
    fresh: bool
    """Whether the new tokens see themselves alone: nothing is kept yet."""
    beside: bool
    """Whether they see the past beside themselves, for they overwrite what one of them must see; else the rings."""


def place(order_BT: Tensor, length_B: Tensor, past_slots: int, *, window: int | None, capacity: int | None) -> Place:
    """Where tokens of this order go after `length_B` [B] tokens of a row, in rings of `past_slots`."""
    T = order_BT.shape[1]
    slots = grown_slots(past_slots, T, window, capacity)
    next_length_B = length_B + tf.reduce_sum(tf.cast(order_BT >= 0, tf.int32), 1)
    fresh = past_slots == 1  # only the spare slot: nothing is kept yet
    beside = not fresh and overwrites_visible(slots, past_slots, T, window, capacity)
    # padding, and what a long chunk would overwrite at once, goes to the spare slot
    fits_BT = (order_BT >= 0) & (order_BT > next_length_B[:, None] - slots)
    slot_BT = tf.where(fits_BT, order_BT % slots, next_length_B[:, None] % slots)
    if fresh:
        seen_order_BS = order_BT
    elif beside:
        seen_order_BS = tf.concat([slot_order(length_B, past_slots), order_BT], axis=1)
    else:
        seen_order_BS = slot_order(next_length_B, slots)
    return Place(slots, slot_BT, seen_order_BS, fresh, beside)


def remember(
    k_BTKH: Tensor, v_BTKH: Tensor, past: tuple[Tensor, ...] | None, place: Place | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
    """What the new tokens attend to, and what is kept of it.

    `past` is (keys [B, R, K, H], values [B, R, K, H], in int8 their scales [B, R, K], length [B]) or None; its dtype
    may be another than the new ones'. Returns keys and values [B, S, K, H] of what is seen, in the dtype of the new
    ones, and what the layer keeps next, None without a past. A token is seen as it is kept, by itself and by those
    that come with it too: so how a text is cut into calls changes nothing.
    """
    if past is None or place is None:
        return k_BTKH, v_BTKH, None
    old = past[:-1]
    new = stored(k_BTKH, v_BTKH, old[0].dtype)
    kept = tuple(write(*pair, place.slot_BT, place.slots) for pair in zip(old, new, strict=True))
    seen = new if place.fresh else kept
    if place.beside:
        seen = [tf.concat(pair, axis=1) for pair in zip(old, new, strict=True)]
    return *restored(seen, k_BTKH.dtype), kept


def write(x_BRKH: Tensor, new_BTKH: Tensor, slot_BT: Tensor, slots: int) -> Tensor:
    """The new tokens put into their slots of a ring grown to `slots`."""
    if slots > x_BRKH.shape[1]:
        x_BRKH = _grown(x_BRKH, slots)
    B, T = sizes(slot_BT)
    row_BT = tf.broadcast_to(tf.expand_dims(tf.range(B), 1), [B, T])
    return tf.tensor_scatter_nd_update(x_BRKH, tf.stack([row_BT, slot_BT], -1), new_BTKH)
