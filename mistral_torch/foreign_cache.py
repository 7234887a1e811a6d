"""transformers' caches in and out of a forward pass: their columns become our slots, and the new tokens their columns.

A cache of theirs has a column for each column of the batch, padding included, as [B, K, S, H]; ours has a slot for each
real token of a row. What comes back is the object that was given, with the new columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from mistral_core import MistralConfig
from mistral_core.errors import InputError, UnsupportedFeatureError

from .cache import KVCache
from .layers import token_order

LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")
"""Their kinds of layers whose keys and values lie in the order of the columns."""


F = TypeVar("F", bound=Callable[..., Any])


def takes_foreign_caches(forward: F) -> F:
    """A forward pass of MistralModel that takes and returns transformers' caches too."""

    @functools.wraps(forward)
    def with_any_cache(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        if not is_foreign(past_key_values):
            return forward(
                self,
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                return_dict=return_dict,
                **options,
            )
        batch, new = np.shape(inputs_embeds)[:2] if input_ids is None else (1, *np.shape(input_ids))[-2:]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        past = own_cache(self.config, past_key_values, attention_mask, new, batch=batch, like=like)
        before = past.length
        out = forward(self, input_ids, attention_mask, position_ids, past, inputs_embeds, return_dict=True, **options)
        mask_BT = torch.ones(batch, new, dtype=torch.int64, device=before.device)
        if attention_mask is not None:
            mask_BT = torch.atleast_2d(torch.as_tensor(attention_mask, device=before.device))[:, -new:]
        theirs = given_back(past_key_values, out.past_key_values, token_order((mask_BT != 0).long(), before))
        return self.as_tuple_if_asked(out._replace(past_key_values=theirs), return_dict)

    return cast(F, with_any_cache)


def is_foreign(past: Any) -> bool:
    """Whether this is a cache of transformers: layers of keys and values, and a way to add to them."""
    return hasattr(past, "layers") and hasattr(past, "update") and hasattr(past, "get_seq_length")


def own_cache(config: MistralConfig, past: Any, attention_mask: Any, new: int, *, batch: int, like: Tensor) -> KVCache:
    """A KVCache with what a cache of theirs holds and room for `new` more columns.

    `attention_mask` [B, S + new] says which columns are real; without one all are. `like` has the dtype and the device
    of an empty cache. Raises InputError, UnsupportedFeatureError.
    """
    columns = int(past.get_seq_length())
    real_BS = torch.ones(batch, columns, dtype=torch.int64, device=like.device)
    if attention_mask is not None:
        mask = torch.atleast_2d(torch.as_tensor(attention_mask, device=like.device))
        if mask.shape[1] >= columns + new:
            real_BS = (mask[:, -columns - new :][:, :columns] != 0).long()
    order_BS = torch.where(real_BS != 0, real_BS.cumsum(1) - 1, columns + new)
    layers = [*past.layers, *[None] * (config.num_hidden_layers - len(past.layers))]
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"past_key_values: {len(layers)} layers, the model has {config.num_hidden_layers}; make a new cache."
        )
    empty = like.new_zeros(batch, columns + new + 1, config.num_key_value_heads, config.head_dim)
    pairs = zip(layers, config.layer_windows, strict=True)
    keys, values = zip(*(_slots(layer, order_BS, empty, window) for layer, window in pairs), strict=True)
    return KVCache(keys, values, real_BS.sum(1), columns + new)


def _slots(layer: Any, order_BS: Tensor, empty_BRKH: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, R, K, H] of a layer [B, K, S, H], of which it may hold the last columns only."""
    if layer is None or not getattr(layer, "is_initialized", True) or not order_BS.shape[1]:
        return empty_BRKH.clone(), empty_BRKH.clone()
    if type(layer).__name__ not in LAYERS:
        raise UnsupportedFeatureError(
            f"past_key_values: layers of {type(layer).__name__}; of transformers' caches DynamicCache and StaticCache "
            "without windows are taken, or leave it out for a KVCache."
        )
    columns = order_BS.shape[1]
    held = [x[:, :, :columns].transpose(1, 2) for x in (layer.keys, layer.values)]
    B, _, K, H = empty_BRKH.shape
    if any((x.shape[0], *x.shape[2:]) != (B, K, H) for x in held):
        raise InputError(
            f"past_key_values: keys must be [{B}, {K}, columns, {H}], got {tuple(layer.keys.shape)}; make a new cache "
            "for another batch or model."
        )
    slot_BS = order_BS[:, columns - held[0].shape[1] :]
    real_B, held_B = ((slots < columns).sum(1) for slots in (order_BS, slot_BS))  # padding lies in the last slot
    if bool((held_B < real_B.clamp(max=columns if window is None else window - 1)).any()):
        raise InputError(
            "past_key_values: it has dropped tokens that the window still shows, as padding lies between the others; "
            "make the cache without a config, which keeps them all."
        )
    row_B1 = torch.arange(B, device=slot_BS.device)[:, None]
    first, second = (empty_BRKH.to(x.dtype).index_put((row_B1, slot_BS), x) for x in held)
    return first, second


def given_back(past: Any, cache: KVCache, order_BT: Tensor) -> Any:
    """A cache of theirs with the new columns of ours, whose orders are [B, T], -1 for padding; there, zeros."""
    row_B1 = torch.arange(order_BT.shape[0], device=order_BT.device)[:, None]
    real_BT = (order_BT >= 0)[:, :, None, None]
    for index, layer in enumerate(zip(cache.keys, cache.values, strict=True)):
        new = [torch.where(real_BT, x[row_B1, order_BT.clamp(min=0)], 0).transpose(1, 2) for x in layer]
        past.update(*new, index)
    return past
