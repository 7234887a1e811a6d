"""The KV cache as a value: it goes into a call and the next one comes out; full or rolling.

The layout is specified and drawn in `mistral_core.reference.cache`: the token of order o lives in slot o mod R.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_core import MistralConfig
from mistral_core.generation.cache_layout import (
    cache_dtype,
    check_rollback,
    cropped,
    grown_slots,
    layer_slots,
    overwrites_visible,
)

LARGEST_CODE = 127
"""The code of a vector's largest number, in int8."""


class KVCache(NamedTuple):
    """Keys and values of the past: a value, into a call and out of it again.

    Always use the one a call returns: where no gradients flow, its memory is the old one's.
    """

    keys: tuple[Tensor, ...]
    """L tensors [B, R, K, H], rotated; in int8 their codes."""
    values: tuple[Tensor, ...]
    """L tensors [B, R, K, H]; in int8 their codes."""
    length: Tensor
    """[B] int64: real tokens so far."""
    capacity: int | None = None
    """The most real tokens a row may have; None: layers grow as far as their window."""
    key_scales: tuple[Tensor, ...] = ()
    """L tensors [B, R, K] float32, by which the codes of keys are multiplied; none where keys are floats."""
    value_scales: tuple[Tensor, ...] = ()
    """L tensors [B, R, K] float32, by which the codes of values are multiplied."""

    @classmethod
    def allocate(
        cls,
        config: MistralConfig,
        batch_size: int,
        capacity: int | None = None,
        *,
        rolling: bool = True,
        lookback: int = 0,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
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
        kind = getattr(torch, cache_dtype(dtype))
        scaled = [shape[:-1] for shape in shapes] if kind == torch.int8 else []
        return cls(
            tuple(torch.zeros(shape, dtype=kind, device=device) for shape in shapes),
            tuple(torch.zeros(shape, dtype=kind, device=device) for shape in shapes),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            capacity,
            tuple(torch.zeros(shape, device=device) for shape in scaled),
            tuple(torch.zeros(shape, device=device) for shape in scaled),
        )

    @property
    def dtype(self) -> torch.dtype:
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
        return self._with(zip(*kept, strict=True), self.length + (order_BT >= 0).sum(1), self.capacity)

    def rollback(self, count_B: Tensor, config: MistralConfig) -> KVCache:
        """Forget the last `count_B` [B] tokens of each row.

        Raises InputError where a rolling layer no longer has what the window would show.
        """
        count_B = torch.as_tensor(count_B, device=self.length.device)
        if not torch.compiler.is_compiling():
            check_rollback(config, [k.shape[1] for k in self.keys], self.length.tolist(), count_B.tolist())
        return self._replace(length=self.length - count_B)

    def select_rows(self, row_B: Tensor) -> KVCache:
        """A copy of other rows: each may be left out, moved or there several times."""
        row_B = torch.as_tensor(row_B, device=self.length.device)
        kept = ([x.index_select(0, row_B) for x in xs] for xs in self._kept())
        return self._with(kept, self.length[row_B], self.capacity)

    def grown(self, slots: tuple[int, ...], capacity: int | None) -> KVCache:
        """A copy with larger rings, as `cache_layout.grown_layout` allows."""
        return self._with((map(_grown, xs, slots) for xs in self._kept()), self.length, capacity)

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
        return self._replace(length=self.length - torch.tensor(back, device=self.length.device))

    def reorder_cache(self, beam_idx: Tensor) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> KVCache:
        """The cache with each row so many times; use what is returned."""
        return self.select_rows(torch.arange(len(self.length), device=self.length.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> KVCache:
        """The cache of these rows, as `select_rows`; use what is returned."""
        return self.select_rows(indices)


def _grown(x_BRKH: Tensor, slots: int) -> Tensor:
    return F.pad(x_BRKH, (0, 0) * (x_BRKH.ndim - 2) + (0, slots - x_BRKH.shape[1]))


def slot_order(length_B: Tensor, slots: int) -> Tensor:
    """[B, R]: the order of the token in each slot, -1 where there is none."""
    newest = length_B[:, None] - 1
    order = newest - (newest - torch.arange(slots, device=length_B.device)) % slots
    return order.clamp(min=-1)


def int8_codes(x_BTKH: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, T, K, H] int8 and scales [B, T, K] float32 whose product is nearest to x: max|x| over H has code 127.

    Halves go to the even code, and a vector of zeros has scale 0 and codes 0.
    """
    x_BTKH = x_BTKH.detach().float()
    scale_BTK = x_BTKH.abs().amax(-1) / LARGEST_CODE
    codes_BTKH = torch.round(x_BTKH / torch.where(scale_BTK == 0, 1, scale_BTK)[..., None])
    return codes_BTKH.to(torch.int8), scale_BTK


def stored(k_BTKH: Tensor, v_BTKH: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Keys and values as a cache of this dtype keeps them, in int8 their codes and then their scales."""
    if dtype != torch.int8:
        return k_BTKH.to(dtype), v_BTKH.to(dtype)
    (keys, key_scales), (values, value_scales) = int8_codes(k_BTKH), int8_codes(v_BTKH)
    return keys, values, key_scales, value_scales


def restored(kept: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, S, K, H] in the dtype of the model, of what a cache keeps."""
    keys, values, *scales = kept
    if scales:
        keys, values = (codes.float() * scale[..., None] for codes, scale in zip((keys, values), scales, strict=True))
    return keys.to(dtype), values.to(dtype)


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
    next_length_B = length_B + (order_BT >= 0).sum(1)
    fresh = past_slots == 1 or _is_empty(length_B, T)  # only the spare slot, or nothing in any: nothing is kept yet
    beside = not fresh and overwrites_visible(slots, past_slots, T, window, capacity)
    # padding, and what a long chunk would overwrite at once, goes to the spare slot
    fits_BT = (order_BT >= 0) & (order_BT > next_length_B[:, None] - slots)
    slot_BT = torch.where(fits_BT, order_BT % slots, next_length_B[:, None] % slots)
    if fresh:
        seen_order_BS = order_BT
    elif beside:
        seen_order_BS = torch.cat([slot_order(length_B, past_slots), order_BT], dim=1)
    else:
        seen_order_BS = slot_order(next_length_B, _used_slots(next_length_B, slots))
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
    seen = new
    if place.beside:  # joined before the write, which may reuse the memory
        seen = [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
    kept = tuple(write(*pair, place.slot_BT, place.slots) for pair in zip(old, new, strict=True))
    if not (place.fresh or place.beside):
        seen = tuple(x[:, : place.order_BS.shape[1]] for x in kept)
    return *restored(seen, k_BTKH.dtype), kept


def _used_slots(length_B: Tensor, slots: int) -> int:
    """How many slots of a ring are looked at: on a CPU, where lengths are there to ask, those that hold tokens."""
    if not length_B.is_cpu or not has_values(length_B):
        return slots
    return min(max(int(length_B.max()), 1), slots)


def _is_empty(length_B: Tensor, columns: int) -> bool:
    """Whether a prompt is the first in its cache, as far as there are values to look at: then it sees itself only."""
    return columns > 1 and has_values(length_B) and not bool(length_B.any())


def has_values(x: Tensor) -> bool:
    """Whether an array has values that a decision may look at: it is no stand-in for one, nor cut over processes."""
    return not (torch.compiler.is_compiling() or is_mapped() or x.is_meta) and type(x) is Tensor


def write(x_BRKH: Tensor, new_BTKH: Tensor, slot_BT: Tensor, slots: int) -> Tensor:
    """The new tokens put into their slots of a ring grown to `slots`.

    In place where nobody differentiates, nor maps (torch.func).
    """
    if slots > x_BRKH.shape[1]:
        x_BRKH = _grown(x_BRKH, slots)
    row_B1 = torch.arange(slot_BT.shape[0], device=slot_BT.device)[:, None]
    put = x_BRKH.index_put if torch.is_grad_enabled() or is_mapped() else x_BRKH.index_put_
    return put((row_B1, slot_BT), new_BTKH)


def is_mapped() -> bool:
    """Whether torch.func transforms what is computed: its arrays have no values and cannot be written."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
