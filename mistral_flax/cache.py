"""The KV cache as a value: it goes into a call and the next one comes out; full or rolling.

The layout is specified and drawn in `mistral_core.reference.cache`: the token of order o lives in slot o mod R.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mistral_core import MistralConfig
from mistral_core.generation.cache_layout import (
    cache_dtype,
    check_rollback,
    cropped,
    grown_slots,
    layer_slots,
    overwrites_visible,
)

from .processes import is_here
from .programs import in_one_program

LARGEST_CODE = 127
"""The code of a vector's largest number, in int8."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the past: a value, into a call and out of it again.

    A pytree whose capacity is static.
    """

    keys: tuple[Array, ...]
    """L arrays [B, R, K, H], rotated; in int8 their codes."""
    values: tuple[Array, ...]
    """L arrays [B, R, K, H]; in int8 their codes."""
    length: Array
    """[B] int32: real tokens so far."""
    capacity: int | None = dataclasses.field(default=None, metadata={"static": True})
    """The most real tokens a row may have; None: layers grow as far as their window."""
    key_scales: tuple[Array, ...] = ()
    """L arrays [B, R, K] float32, by which the codes of keys are multiplied; none where keys are floats."""
    value_scales: tuple[Array, ...] = ()
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
        dtype: Any = jnp.float32,
        device: Any = None,
    ) -> KVCache:
        """An empty cache for `capacity` tokens a row; without one it grows with the text, as far as each window.

        `rolling=False` keeps every token of windowed layers too; the last `lookback` tokens can always be rolled back.
        `dtype` may be int8: codes, and a scale for each token and key/value head; no gradient flows through them.
        `device` may be a Sharding of the first three axes.
        Raises ConfigError for a dtype that no cache can have.
        """
        config = MistralConfig.of(config)
        shapes = [
            (batch_size, slots, config.num_key_value_heads, config.head_dim)
            for slots in layer_slots(config, capacity, rolling=rolling, lookback=lookback)
        ]
        kind = jnp.dtype(cache_dtype(dtype))
        scaled = [shape[:-1] for shape in shapes] if kind == jnp.int8 else []
        return cls(
            tuple(jnp.zeros(shape, kind, device=device) for shape in shapes),
            tuple(jnp.zeros(shape, kind, device=device) for shape in shapes),
            jnp.zeros(batch_size, jnp.int32),
            capacity,
            tuple(jnp.zeros(shape, jnp.float32, device=device) for shape in scaled),
            tuple(jnp.zeros(shape, jnp.float32, device=device) for shape in scaled),
        )

    @property
    def dtype(self) -> Any:
        """What keys and values are kept in."""
        return self.keys[0].dtype

    def layer(self, index: int) -> tuple[Array, ...]:
        """Keys, values, the scales of their codes if they have some, and length, as one layer reads them."""
        return *(x[index] for x in self._kept() if x), self.length

    def _kept(self) -> tuple[tuple[Array, ...], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales

    def _with(self, kept: Iterable[Iterable[Array]], length_B: Array, capacity: int | None) -> KVCache:
        keys, values, *scales = map(tuple, kept)
        return KVCache(keys, values, length_B, capacity, *scales)

    def advanced(self, kept: Iterable[tuple[Array, ...]], order_BT: Array) -> KVCache:
        """The cache after a call: what each layer keeps now, and as many tokens more as have an order."""
        return self._with(zip(*kept, strict=True), self.length + (order_BT >= 0).sum(1), self.capacity)

    def rollback(self, count_B: Array, config: MistralConfig) -> KVCache:
        """Forget the last `count_B` [B] tokens of each row.

        Raises InputError where a rolling layer no longer has what the window would show.
        """
        count_B = jnp.asarray(count_B, jnp.int32)
        if all(not isinstance(x, jax.core.Tracer) and is_here(x) for x in (self.length, count_B)):
            check_rollback(config, [k.shape[1] for k in self.keys], self.length.tolist(), count_B.tolist())
        return dataclasses.replace(self, length=self.length - count_B)

    def select_rows(self, row_B: Array) -> KVCache:
        """A copy of other rows: each may be left out, moved or there several times."""
        row_B = jnp.asarray(row_B)
        kept = ([jnp.take(x, row_B, axis=0) for x in xs] for xs in self._kept())
        return self._with(kept, self.length[row_B], self.capacity)

    def grown(self, slots: tuple[int, ...], capacity: int) -> KVCache:
        """A copy with larger rings, as `cache_layout.grown_layout` allows."""
        return self._with((map(_grown, xs, slots) for xs in self._kept()), jnp.copy(self.length), capacity)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many real tokens the longest row has."""
        return max(self.length.tolist(), default=0)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most real tokens a row may have; -1 where the cache grows."""
        return -1 if self.capacity is None else self.capacity

    def crop(self, max_length: int) -> KVCache:
        """The cache of each row's first tokens, or without the last so many if negative; use what is returned.

        Raises InputError where it has rolled on.
        """
        back = cropped([k.shape[1] for k in self.keys], self.length.tolist(), max_length)
        return dataclasses.replace(self, length=self.length - jnp.asarray(back, jnp.int32))

    def reorder_cache(self, beam_idx: Array) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> KVCache:
        """The cache with each row so many times; use what is returned."""
        return self.select_rows(jnp.repeat(jnp.arange(len(self.length)), repeats))

    def batch_select_indices(self, indices: Array) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(indices)


def _grown(x_BRKH: Array, slots: int) -> Array:
    return jnp.pad(jnp.copy(x_BRKH), ((0, 0), (0, slots - x_BRKH.shape[1]), *((0, 0),) * (x_BRKH.ndim - 2)))


@functools.partial(in_one_program, static_argnames="slots")
def slot_order(length_B: Array, slots: int) -> Array:
    """[B, R]: the order of the token in each slot, -1 where there is none."""
    newest = length_B[:, None] - 1
    order = newest - (newest - jnp.arange(slots)[None]) % slots
    return jnp.maximum(order, -1)


@in_one_program
def int8_codes(x_BTKH: Array) -> tuple[Array, Array]:
    """Codes [B, T, K, H] int8 and scales [B, T, K] float32 whose product is nearest to x: max|x| over H has code 127.

    Halves go to the even code, and a vector of zeros has scale 0 and codes 0.
    """
    x_BTKH = jax.lax.stop_gradient(x_BTKH).astype(jnp.float32)
    scale_BTK = jnp.abs(x_BTKH).max(-1) / LARGEST_CODE
    codes_BTKH = jnp.round(x_BTKH / jnp.where(scale_BTK == 0, 1, scale_BTK)[..., None])
    return codes_BTKH.astype(jnp.int8), scale_BTK


def stored(k_BTKH: Array, v_BTKH: Array, dtype: Any) -> tuple[Array, ...]:
    """Keys and values as a cache of this dtype keeps them, in int8 their codes and then their scales."""
    if dtype != jnp.int8:
        return k_BTKH.astype(dtype), v_BTKH.astype(dtype)
    (keys, key_scales), (values, value_scales) = int8_codes(k_BTKH), int8_codes(v_BTKH)
    return keys, values, key_scales, value_scales


def restored(kept: Iterable[Array], dtype: Any) -> tuple[Array, Array]:
    """Keys and values [B, S, K, H] in the dtype of the model, of what a cache keeps."""
    keys, values, *scales = kept
    if scales:
        pairs = zip((keys, values), scales, strict=True)
        keys, values = (codes.astype(jnp.float32) * scale[..., None] for codes, scale in pairs)
    return keys.astype(dtype), values.astype(dtype)


class Place(NamedTuple):
    """Where the new tokens of a call go in rings of one size, and what the queries of that layer then see."""

    slots: int
    """R of the rings after the call."""
    slot_BT: Array
    """[B, T]: the slot of each new token."""
    order_BS: Array
    """[B, S]: the order of each key that is seen."""
    fresh: bool
    """Whether the new tokens see themselves alone: nothing is kept yet."""
    beside: bool
    """Whether they see the past beside themselves, for they overwrite what one of them must see; else the rings."""


def place(order_BT: Array, length_B: Array, past_slots: int, *, window: int | None, capacity: int | None) -> Place:
    """Where tokens of this order go after `length_B` [B] tokens of a row, in rings of `past_slots`."""
    T = order_BT.shape[1]
    slots = grown_slots(past_slots, T, window, capacity)
    fresh = past_slots == 1  # only the spare slot: nothing is kept yet
    beside = not fresh and overwrites_visible(slots, past_slots, T, window, capacity)
    slot_BT, next_length_B = _new_slots(order_BT, length_B, slots)
    if fresh:
        seen_order_BS = order_BT
    elif beside:
        seen_order_BS = jnp.concatenate([slot_order(length_B, past_slots), order_BT], axis=1)
    else:
        seen_order_BS = slot_order(next_length_B, slots)
    return Place(slots, slot_BT, seen_order_BS, fresh, beside)


@functools.partial(in_one_program, static_argnames="slots")
def _new_slots(order_BT: Array, length_B: Array, slots: int) -> tuple[Array, Array]:
    """[B, T]: the slot of each new token; and the length [B] after them."""
    next_length_B = length_B + (order_BT >= 0).sum(1)
    # padding, and what a long chunk would overwrite at once, goes to the spare slot
    fits_BT = (order_BT >= 0) & (order_BT > next_length_B[:, None] - slots)
    return jnp.where(fits_BT, order_BT % slots, next_length_B[:, None] % slots), next_length_B


def remember(
    k_BTKH: Array, v_BTKH: Array, past: tuple[Array, ...] | None, place: Place | None
) -> tuple[Array, Array, tuple[Array, ...] | None]:
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
        seen = [jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)]
    return *restored(seen, k_BTKH.dtype), kept


@functools.partial(in_one_program, static_argnames="slots")
def write(x_BRKH: Array, new_BTKH: Array, slot_BT: Array, slots: int) -> Array:
    """The new tokens put into their slots of a ring grown to `slots`."""
    if slots > x_BRKH.shape[1]:
        x_BRKH = _grown(x_BRKH, slots)
    if slot_BT.shape[1] == 1 and x_BRKH.dtype.itemsize == 2 and jax.default_backend() == "cpu":
        # XLA for CPUs scatters into 16 bits through a float32 copy of the whole cache
        return jnp.where((jnp.arange(slots)[None] == slot_BT)[:, :, None, None], new_BTKH, x_BRKH)
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]
    return x_BRKH.at[row_B1, slot_BT].set(new_BTKH)
