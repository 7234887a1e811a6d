"""The one decode loop: prefill, step, stopping, over a backend's compiled prefill and step.

A backend gives two functions; `state` is its own business (cache and last token, on its device):

    prefill(ids_BT, mask_BT)  ->  (token_B in NumPy, state)
    step(state)               ->  (token_B in NumPy, state)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import validate
from .config import MistralConfig
from .generation import GenerationConfig, check_prompt
from .validate import Array

Prefill = Callable[[Array, Array], tuple[Array, Any]]
Step = Callable[[Any], tuple[Array, Any]]


def tokens(
    prefill: Prefill, step: Step, ids_BT: Array, mask_BT: Array, generation: GenerationConfig
) -> Iterator[Array]:
    """Yield the new tokens [B] of each step; ended rows emit padding; ends when every row has.

    Only a generated end of sequence ends a row, not one in the prompt. A row that has ended is still computed, and
    ignored.
    """
    if generation.max_new_tokens == 0:
        return
    ended_B = np.zeros(len(ids_BT), bool)
    token_B, state = prefill(ids_BT, mask_BT)
    for new in range(1, generation.max_new_tokens + 1):
        yield np.where(ended_B, generation.padding, token_B)
        ended_B |= np.isin(token_B, generation.eos_token_ids)
        if ended_B.all() or new == generation.max_new_tokens:
            return
        token_B, state = step(state)


def generate(prefill: Prefill, step: Step, ids_BT: Array, mask_BT: Array, generation: GenerationConfig) -> Array:
    """[B, T + new]: the prompt as given, then the new tokens."""
    return np.stack([*ids_BT.T, *tokens(prefill, step, ids_BT, mask_BT, generation)], axis=1).astype(np.int64)


def prepare(
    config: MistralConfig,
    input_ids: Any,
    attention_mask: Any,
    generation: GenerationConfig,
    options: dict[str, Any],
) -> tuple[Array, Array, GenerationConfig]:
    """Ids and mask as int64 [B, T] and the options in force, all checked."""
    ids_BT = validate.integers("input_ids", input_ids)
    generation = generation.replace(**options).for_prompt(ids_BT.shape[1])
    generation.check(config)
    mask_BT = np.ones_like(ids_BT) if attention_mask is None else validate.mask(attention_mask)
    validate.check_call(config, input_ids=ids_BT, attention_mask=mask_BT)
    check_prompt(config, generation, mask_BT)
    return ids_BT, mask_BT, generation
