"""`generate`: the prefill and the decode step that core's one loop calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

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
) -> Array:
    """Continue ids [B, T] greedily: [B, T + new] int32, the prompt as given, ended rows padded.

    Rows may be padded on either side. `options` are fields of GenerationConfig and come before
    `generation_config`, which comes before the checkpoint's own. Prefill and step are compiled once per shape unless
    `compile="off"`. Raises GenerationConfigError, EmptyInputError, SequenceTooLongError, TokenIdError, MaskError.
    """
    ids, mask, generation = decoding.prepare(
        model.config, input_ids, attention_mask, generation_config or model.generation_config, options
    )
    graph, state = nnx.split(model)
    first, following = _steps(graph) if generation.compile != "off" else _plain_steps(graph)

    def prefill(ids_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[np.ndarray, Any]:
        cache = KVCache.allocate(
            model.config,
            len(ids_BT),
            ids_BT.shape[1] + generation.max_new_tokens,
            rolling=generation.cache != "full",
            dtype=model.dtype,
        )
        token_B, cache = first(state, jnp.asarray(ids_BT, jnp.int32), jnp.asarray(mask_BT, jnp.int32), cache)
        return to_numpy(token_B), (token_B, cache)

    def step(last: Any) -> tuple[np.ndarray, Any]:
        token_B, cache = following(state, *last)
        return to_numpy(token_B), (token_B, cache)

    return jnp.asarray(decoding.generate(prefill, step, ids, mask, generation), jnp.int32)


@functools.lru_cache(maxsize=32)
def _steps(graph: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled prefill and step of all models of this graph: what a model is apart from its arrays."""
    first, following = _plain_steps(graph)
    return jax.jit(first), jax.jit(following, donate_argnums=2)


def _plain_steps(graph: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return functools.partial(_prefill, graph), functools.partial(_decode, graph)


def _prefill(graph: Any, state: Any, ids_BT: Array, mask_BT: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """The first new token [B] of each row and the cache after the prompt."""
    model = nnx.merge(graph, state)
    out = model.model(ids_BT, mask_BT, past_key_values=cache, return_dict=True)
    last_BD = out.last_hidden_state[jnp.arange(ids_BT.shape[0]), last_token(mask_BT)]
    return project(last_BD, model.head_weight).argmax(-1).astype(jnp.int32), out.past_key_values


def _decode(graph: Any, state: Any, token_B: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """The next token [B] of each row and the cache after the given one."""
    model = nnx.merge(graph, state)
    out = model.model(token_B[:, None], past_key_values=cache, return_dict=True)
    return project(out.last_hidden_state[:, 0], model.head_weight).argmax(-1).astype(jnp.int32), out.past_key_values
