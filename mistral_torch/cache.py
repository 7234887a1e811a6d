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
from mistral_core.generation.cache_layout import check_rollback, cropped, grown_slots, layer_slots, overwrites_visible


class KVCache(NamedTuple):
    """Keys and values of the past: a value, into a call and out of it again.

    Always use the one a call returns: where no gradients flow, its memory is the old one's.
    """

    keys: tuple[Tensor, ...]
    """L tensors [B, R, K, H], rotated."""
    values: tuple[Tensor, ...]
    """L tensors [B, R, K, H]."""
    length: Tensor
    """[B] int64: real tokens so far."""
    capacity: int | None = None
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
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
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes),
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            capacity,
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and length, as one layer reads them."""
        return self.keys[index], self.values[index], self.length

    def advanced(self, kept: Iterable[tuple[Tensor, Tensor]], order_BT: Tensor) -> KVCache:
        """The cache after a call: what each layer keeps now, and as many tokens more as have an order."""
        keys, values = zip(*kept, strict=True)
        return KVCache(keys, values, self.length + (order_BT >= 0).sum(1), self.capacity)

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
        keys, values = (tuple(x.index_select(0, row_B) for x in xs) for xs in (self.keys, self.values))
        return KVCache(keys, values, self.length[row_B], self.capacity)

    def grown(self, slots: tuple[int, ...], capacity: int) -> KVCache:
        """A copy with larger rings, as `cache_layout.grown_layout` allows."""
        keys, values = (tuple(map(_grown, xs, slots)) for xs in (self.keys, self.values))
        return KVCache(keys, values, self.length, capacity)

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
    return F.pad(x_BRKH, (0, 0, 0, 0, 0, slots - x_BRKH.shape[1]))


def slot_order(length_B: Tensor, slots: int) -> Tensor:
    """[B, R]: the order of the token in each slot, -1 where there is none."""
    newest = length_B[:, None] - 1
    order = newest - (newest - torch.arange(slots, device=length_B.device)) % slots
    return order.clamp(min=-1)


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
    next_length_B = length_B + (order_BT >= 0).sum(1)
    fresh = past_slots == 1 or _is_empty(length_B, T)  # only the spare slot, or nothing in any: nothing is kept yet
    beside = not fresh and overwrites_visible(slots, past_slots, T, window, capacity)
    if beside:  # joined before the write, which may reuse the memory
        seen = torch.cat([keys.to(k_BTKH.dtype), k_BTKH], dim=1), torch.cat([values.to(v_BTKH.dtype), v_BTKH], dim=1)
        seen_order_BS = torch.cat([slot_order(length_B, past_slots), order_BT], dim=1)
    # padding, and what a long chunk would overwrite at once, goes to the spare slot
    fits_BT = (order_BT >= 0) & (order_BT > next_length_B[:, None] - slots)
    slot_BT = torch.where(fits_BT, order_BT % slots, next_length_B[:, None] % slots)
    kept = write(keys, k_BTKH, slot_BT, slots), write(values, v_BTKH, slot_BT, slots)
    if fresh:
        seen, seen_order_BS = (k_BTKH, v_BTKH), order_BT
    elif not beside:
        seen = kept[0].to(k_BTKH.dtype), kept[1].to(v_BTKH.dtype)
        seen_order_BS = slot_order(next_length_B, slots)
    return *seen, seen_order_BS, kept


def _is_empty(length_B: Tensor, columns: int) -> bool:
    """Whether a prompt is the first in its cache, as far as there are values to look at: then it sees itself only."""
    if columns == 1 or torch.compiler.is_compiling() or is_mapped() or length_B.is_meta or type(length_B) is not Tensor:
        return False
    return not bool(length_B.any())


def write(x_BRKH: Tensor, new_BTKH: Tensor, slot_BT: Tensor, slots: int) -> Tensor:
    """The new tokens put into their slots of a ring grown to `slots`.

    In place where nobody differentiates, nor maps (torch.func).
    """
    if slots > x_BRKH.shape[1]:
        x_BRKH = _grown(x_BRKH, slots)
    row_B1 = torch.arange(slot_BT.shape[0], device=slot_BT.device)[:, None]
    put = x_BRKH.index_put if torch.is_grad_enabled() or is_mapped() else x_BRKH.index_put_
    return put((row_B1, slot_BT), new_BTKH.to(x_BRKH.dtype))


def is_mapped() -> bool:
    """Whether torch.func transforms what is computed: its arrays have no values and cannot be written."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
