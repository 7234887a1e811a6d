"""A text through all layers in one call of C, on a CPU where gradients are off: for a loss, an embedding, a class.

What torch computes operation by operation writes some ten arrays of all tokens in each layer; C takes some thousand
tokens through a layer at a time, as it does the prompts of `generate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mistral_core.generation.cache_layout import grown_slots

from . import native
from .arrays import memory
from .attention import DEFAULT
from .bands import document_lengths
from .cache import KVCache
from .step import Step

if TYPE_CHECKING:
    from .model import MistralModel, OfLayers


def in_one_call(run: Callable[..., OfLayers]) -> Callable[..., OfLayers]:
    """The layers of a model in turn, which C computes in one call where nobody looks at what is between them."""

    @functools.wraps(run)
    def computed(
        model: MistralModel, x_BTD: Tensor, steps: list[Step], past: KVCache | None, with_states: bool
    ) -> OfLayers:
        found = _in_c(model, x_BTD, steps[0], past, with_states)
        return run(model, x_BTD, steps, past, with_states) if found is None else found

    return computed


def _in_c(model: MistralModel, x_BTD: Tensor, step: Step, past: KVCache | None, with_states: bool) -> OfLayers | None:
    """What the layers give, of hidden states the last alone, unless all are wanted; None where C computes nothing."""
    if not _is_for_c(model, x_BTD, step, past):
        return None
    begin_BT = None if step.document_ids_BT is None else _beginnings(step.order_BT, step.document_ids_BT)
    if step.document_ids_BT is not None and begin_BT is None:
        return None
    whole = native.whole_step_of(model)
    if whole is None or not whole.is_by_tiles():
        return None
    (B, T, _), L = x_BTD.shape, len(model.layers)
    rings = _rings(model, x_BTD, past)
    y_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
    between = [torch.empty_like(y_BTD) for _ in range(L - 1)] if with_states else []
    cos_BTH, sin_BTH = (memory(each.expand(B, T, -1)) for each in step.cos_sin)
    scale_BT = None if step.query_scale_BT is None else memory(step.query_scale_BT.expand(B, T))
    kept = [[memory(each) for each in of_layers] for of_layers in rings]
    length_B = np.zeros(B, np.int64) if past is None else memory(past.length)
    whole.layers(
        memory(y_BTD), memory(step.order_BT), length_B, cos_BTH, sin_BTH, scale_BT,
        None if begin_BT is None else memory(begin_BT), [*kept, [], []], [memory(each) for each in between],
    )  # fmt: skip
    states = [x_BTD, *between, y_BTD] if with_states else [y_BTD]
    return states, [None] * L, list(zip(*rings, strict=True))


def _is_for_c(model: MistralModel, x_BTD: Tensor, step: Step, past: KVCache | None) -> bool:
    """Whether C may compute the layers of a call: enough tokens, and nothing wanted of what is within a layer.

    A cache is none, or one that grows.
    """
    if not step.in_c or torch.is_grad_enabled() or x_BTD.dtype != model.dtype:
        return False
    if past is not None and not _is_continued_in_c(model, x_BTD, past):
        return False
    return model.implementation == DEFAULT and not step.output_attentions


def _is_continued_in_c(model: MistralModel, x_BTD: Tensor, past: KVCache) -> bool:
    """Whether a cache grows, and is what this model keeps of so many rows, in the dtype of the hidden states."""
    config, rings = model.config, (*past.keys, *past.values)
    ring = x_BTD.shape[0], config.num_key_value_heads, config.head_dim
    alike = all(x.dtype == x_BTD.dtype and (x.shape[0], *x.shape[2:]) == ring for x in rings)
    slots = [[x.shape[1] for x in xs] for xs in (past.keys, past.values)]
    whole = len(past.keys) == len(model.layers) and slots[0] == slots[1] and past.length.dtype == torch.int64
    return past.capacity is None and whole and alike and native.unwatched(*rings, past.length)


def _beginnings(order_BT: Tensor, document_ids_BT: Tensor) -> Tensor | None:
    """[B, T]: the order of the first token of each one's document; None where a document goes on after another one."""
    begin_BT = torch.zeros_like(order_BT)
    for begin_T, order_T, ids_T in zip(begin_BT, order_BT, document_ids_BT.expand_as(order_BT), strict=True):
        real = order_T >= 0
        lengths = document_lengths(ids_T[real])
        if lengths is None:
            return None
        begin_T[real] = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return begin_BT


def _rings(model: MistralModel, x_BTD: Tensor, past: KVCache | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Keys and values [B, R, K, H] of each layer, for the new tokens to be written to: a cache's, grown as it must be.

    Without one they are one layer's after another.
    """
    B, T, _ = x_BTD.shape
    config = model.config
    if past is None:
        slots = max(grown_slots(1, T, window, None) for window in config.layer_windows)
        shape = B, slots, config.num_key_value_heads, config.head_dim
        return [x_BTD.new_empty(shape)] * len(model.layers), [x_BTD.new_empty(shape)] * len(model.layers)
    before = [keys.shape[1] for keys in past.keys]
    slots = [grown_slots(each, T, window, None) for each, window in zip(before, config.layer_windows, strict=True)]
    grown = past if slots == before else past.grown(tuple(slots), past.capacity)
    return [x.contiguous() for x in grown.keys], [x.contiguous() for x in grown.values]
