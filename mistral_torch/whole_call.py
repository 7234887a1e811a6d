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
        found = None if with_states else _in_c(model, x_BTD, steps[0], past)
        return run(model, x_BTD, steps, past, with_states) if found is None else found

    return computed


def _in_c(model: MistralModel, x_BTD: Tensor, step: Step, past: KVCache | None) -> OfLayers | None:
    """What the layers give, of which nothing is kept but the last one's; None where C does not compute them."""
    if not _is_for_c(model, x_BTD, step, past):
        return None
    begin_BT = None if step.document_ids_BT is None else _beginnings(step.order_BT, step.document_ids_BT)
    if step.document_ids_BT is not None and begin_BT is None:
        return None
    whole = native.whole_step_of(model)
    if whole is None or not whole.is_by_tiles():
        return None
    B, T, _ = x_BTD.shape
    rings = _rings(model, x_BTD, past)
    y_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
    cos_BTH, sin_BTH = (memory(each.expand(B, T, -1)) for each in step.cos_sin)
    scale_BT = None if step.query_scale_BT is None else memory(step.query_scale_BT.expand(B, T))
    kept = [[memory(each) for each in of_layers] for of_layers in rings]
    whole.layers(
        memory(y_BTD), memory(step.order_BT), np.zeros(B, np.int64), cos_BTH, sin_BTH, scale_BT,
        None if begin_BT is None else memory(begin_BT), [*kept, [], []],
    )  # fmt: skip
    L = len(model.layers)
    return [y_BTD], [None] * L, list(zip(*rings, strict=True))


def _is_for_c(model: MistralModel, x_BTD: Tensor, step: Step, past: KVCache | None) -> bool:
    """Whether C may compute the layers of a call: enough tokens, and nothing wanted of what is between.

    A cache is none, or a new one that grows.
    """
    if not step.in_c or x_BTD.dtype != model.dtype:
        return False
    if past is not None and not (past.dtype == x_BTD.dtype and _is_new(past)):
        return False
    drops = model.training and model.config.attention_dropout > 0
    return model.implementation == DEFAULT and not step.output_attentions and not drops


def _is_new(past: KVCache) -> bool:
    """Whether a cache that grows holds nothing yet: it has the spare slots alone."""
    return all(keys.shape[1] == 1 for keys in past.keys)


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
    """Keys and values [B, R, K, H] of each layer, for the new tokens to be written to.

    Without a cache they are one layer's after another.
    """
    B, T, _ = x_BTD.shape
    config = model.config
    slots = [grown_slots(1, T, window, None) for window in config.layer_windows]
    shape = config.num_key_value_heads, config.head_dim
    if past is None:
        keys, values = ([x_BTD.new_empty(B, max(slots), *shape)] * len(slots) for _ in range(2))
    else:
        keys, values = ([x_BTD.new_zeros(B, each, *shape) for each in slots] for _ in range(2))
    return keys, values
