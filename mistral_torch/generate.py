"""`generate`: the prefill and the decode step that core's one loop calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mistral_core import GenerationConfig, decoding

from .arrays import to_numpy
from .cache import KVCache
from .layers import last_token, project

if TYPE_CHECKING:
    from .heads import MistralForCausalLM


def generate(
    model: MistralForCausalLM,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor:
    """Continue ids [B, T] greedily: [B, T + new] int64, the prompt as given, ended rows padded.

    Rows may be padded on either side. `options` are fields of GenerationConfig and come before
    `generation_config`, which comes before the checkpoint's own. `compile="on"` compiles the step; "auto" does so
    where there is an accelerator.
    Raises GenerationConfigError, EmptyInputError, SequenceTooLongError, TokenIdError, MaskError.
    """
    device = model.device
    ids, mask, generation = decoding.prepare(
        model.config,
        to_numpy(input_ids) if isinstance(input_ids, Tensor) else input_ids,
        to_numpy(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask,
        generation_config or model.generation_config,
        options,
    )

    def prefill(ids_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[np.ndarray, Any]:
        cache = KVCache.allocate(
            model.config,
            len(ids_BT),
            ids_BT.shape[1] + generation.max_new_tokens,
            rolling=generation.cache != "full",
            dtype=model.dtype,
            device=device,
        )
        token_B, cache = _prefill(
            model, torch.from_numpy(ids_BT).to(device), torch.from_numpy(mask_BT).to(device), cache
        )
        return to_numpy(token_B), (token_B, cache)

    decode = _decode
    if generation.compile == "on" or (generation.compile == "auto" and device.type != "cpu"):
        decode = torch.compile(_decode, fullgraph=True)

    def step(state: Any) -> tuple[np.ndarray, Any]:
        token_B, cache = decode(model, *state)
        return to_numpy(token_B), (token_B, cache)

    with torch.inference_mode():
        tokens_BT = decoding.generate(prefill, step, ids, mask, generation)
    return torch.from_numpy(tokens_BT).to(device)  # an inference tensor could not be trained on


def _prefill(model: MistralForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """The first new token [B] of each row and the cache after the prompt."""
    out = model.model(ids_BT, mask_BT, past_key_values=cache, return_dict=True)
    last_BD = out.last_hidden_state[torch.arange(len(ids_BT), device=ids_BT.device), last_token(mask_BT)]
    return project(last_BD, model.lm_head.weight).argmax(-1), out.past_key_values


def _decode(model: MistralForCausalLM, token_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """The next token [B] of each row and the cache after the given one."""
    out = model.model(token_B[:, None], past_key_values=cache, return_dict=True)
    return project(out.last_hidden_state[:, 0], model.lm_head.weight).argmax(-1), out.past_key_values
