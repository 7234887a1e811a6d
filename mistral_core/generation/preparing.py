"""A call of `generate` before anything is computed: ids or embeddings, mask, functions and options, all checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import validate
from ..arrays import Array
from ..config import MistralConfig
from ..errors import InputError
from .checks import ADVICE, check_prompt
from .engine import Prompt
from .hooks import Hooks
from .options import GenerationConfig


def prepare(
    config: MistralConfig,
    input_ids: Any,
    attention_mask: Any,
    generation: GenerationConfig,
    options: Mapping[str, Any],
    *,
    own: GenerationConfig | None = None,
) -> Prompt:
    """Ids, mask or embeddings of a call, its functions and the options in force, all checked.

    `options` are those of a call: `inputs` is another name of `input_ids`, `inputs_embeds` [B, E, D] is computed in
    their place; without any of these the text begins with `bos_token_id`. `own` is the checkpoint's config, which
    counts where `generation` says nothing, unless `use_model_defaults` is False. Raises GenerationConfigError,
    InputError and its kinds.
    """
    options = dict(options)
    hooks = Hooks.of(options)
    if (inputs := options.pop("inputs", None)) is not None:
        if input_ids is not None:
            raise InputError("inputs: it is another name of input_ids; give one of them.")
        input_ids = inputs
    embeds = options.pop("inputs_embeds", None)
    positions, types = options.pop("position_ids", None), options.pop("token_type_ids", None)
    generation = GenerationConfig.of(generation)
    if options.pop("use_model_defaults", None) is not False and own is not None:
        generation = generation.over(own)
    generation = generation.replace(**options)
    if types is not None and np.any(np.asarray(types)):
        raise InputError(f"token_type_ids: {ADVICE['token_types']}.")
    if embeds is not None:
        prompt = _embedded(config, np.asarray(embeds), input_ids, attention_mask, generation, hooks)
    else:
        if input_ids is None:
            if generation.bos_token_id is None:
                raise InputError("generate: give input_ids or inputs_embeds; there is no bos_token_id to begin with.")
            input_ids = [[generation.bos_token_id]]
        ids_BT = validate.integers("input_ids", input_ids)
        mask_BT = np.ones_like(ids_BT) if attention_mask is None else validate.mask(attention_mask)
        prompt = Prompt(ids_BT, mask_BT, generation.for_prompt(ids_BT.shape[1]), hooks)
    prompt.generation.check(config)
    if embeds is None:
        validate.check_call(config, input_ids=prompt.ids, attention_mask=prompt.mask)
    mask_BT = prompt.mask if prompt.embeds_mask is None else prompt.embeds_mask
    check_prompt(config, prompt.generation, mask_BT)
    _check_positions(positions, mask_BT)
    return prompt


def _embedded(
    config: MistralConfig, embeds_BED: Array, input_ids: Any, attention_mask: Any, generation: GenerationConfig,
    hooks: Hooks,
) -> Prompt:  # fmt: skip
    """A prompt of embeddings; ids beside them are what the options that look back see, and begin the sequences."""
    mask_BE = np.ones(embeds_BED.shape[:2], np.int64) if attention_mask is None else validate.mask(attention_mask)
    validate.check_call(config, inputs_embeds=embeds_BED, attention_mask=mask_BE)
    batch = len(embeds_BED)
    ids_BT = np.zeros((batch, 0), np.int64) if input_ids is None else validate.integers("input_ids", input_ids)
    if input_ids is not None and ids_BT.size:
        validate.check_ids("input_ids", ids_BT, config.vocab_size)
    if len(ids_BT) != batch:
        raise InputError(f"input_ids must have as many rows as inputs_embeds, {batch}, got {len(ids_BT)}.")
    first = mask_BE.shape[1] - ids_BT.shape[1]  # embeddings that stand before those of the ids
    mask_BT = mask_BE[:, first:] if first >= 0 else np.ones_like(ids_BT)
    columns = embeds_BED.shape[1] if generation.max_length is not None else ids_BT.shape[1]
    return Prompt(ids_BT, mask_BT, generation.for_prompt(columns), hooks, embeds_BED, mask_BE)


def _check_positions(positions: Any, mask_BT: Array) -> None:
    """Positions given must be those of the mask, which are counted anyway."""
    if positions is None:
        return
    found = np.broadcast_to(np.asarray(positions), mask_BT.shape)
    if (found != np.cumsum(mask_BT, axis=1) - 1)[mask_BT != 0].any():
        raise InputError("position_ids: generate counts positions from the attention_mask; leave them out.")
