"""`generate`: the prefill and the decode step that core's one loop calls."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import GenerationConfig, decoding

from .arrays import to_numpy
from .cache import KVCache
from .layers import last_token, project
from .traces import changed

if TYPE_CHECKING:
    from .heads import MistralForCausalLM

_compiled: weakref.WeakKeyDictionary[Any, tuple[Callable[..., Any], Callable[..., Any]]] = weakref.WeakKeyDictionary()


def generate(
    model: MistralForCausalLM,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor:
    """Continue ids [B, T] greedily: [B, T + new] int32, the prompt as given, ended rows padded.

    Rows may be padded on either side. `options` are fields of GenerationConfig and come before
    `generation_config`, which comes before the checkpoint's own. Prefill and step are traced once per shape unless
    `compile="off"`. Raises GenerationConfigError, EmptyInputError, SequenceTooLongError, TokenIdError, MaskError.
    """
    ids, mask, generation = decoding.prepare(
        model.config,
        to_numpy(input_ids) if tf.is_tensor(input_ids) else input_ids,
        to_numpy(attention_mask) if tf.is_tensor(attention_mask) else attention_mask,
        generation_config or model.generation_config,
        options,
    )
    first, following = _steps(model) if generation.compile != "off" else _plain_steps(model)

    def prefill(ids_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[np.ndarray, Any]:
        cache = KVCache.allocate(
            model.config,
            len(ids_BT),
            ids_BT.shape[1] + generation.max_new_tokens,
            rolling=generation.cache != "full",
            dtype=model.compute_dtype,
        )
        token_B, cache = first(tf.constant(ids_BT, tf.int32), tf.constant(mask_BT, tf.int32), cache)
        return to_numpy(token_B), (token_B, cache)

    def step(state: Any) -> tuple[np.ndarray, Any]:
        token_B, cache = following(*state)
        return to_numpy(token_B), (token_B, cache)

    return tf.constant(decoding.generate(prefill, step, ids, mask, generation), tf.int32)


def _steps(model: MistralForCausalLM) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The traced prefill and step of a model, kept as long as the model stays as it is."""
    if changed(model, "generate") or model not in _compiled:
        first, following = _plain_steps(weakref.proxy(model))
        _compiled[model] = tf.function(first), tf.function(following)
    return _compiled[model]


def _plain_steps(model: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return functools.partial(_prefill, model), functools.partial(_decode, model)


def _prefill(model: MistralForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """The first new token [B] of each row and the cache after the prompt."""
    out = model.model(ids_BT, mask_BT, past_key_values=cache, return_dict=True)
    last_BD = tf.gather(out.last_hidden_state, last_token(mask_BT), batch_dims=1)
    return tf.argmax(project(last_BD, model.head_weight), -1, tf.int32), out.past_key_values


def _decode(model: MistralForCausalLM, token_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """The next token [B] of each row and the cache after the given one."""
    out = model.model(token_B[:, None], past_key_values=cache, return_dict=True)
    logits = project(out.last_hidden_state[:, 0], model.head_weight)
    return tf.argmax(logits, -1, tf.int32), out.past_key_values
