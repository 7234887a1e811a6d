"""`generate`: the engine that core's one decode driver runs on, compiled or not."""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core.classes import is_as_written
from mistral_core.generation import driver
from mistral_core.generation.sampling import Rule, Values

from . import native
from .arrays import to_numpy
from .cache import KVCache
from .sampling import Choice, choose
from .weights import as_program

if TYPE_CHECKING:
    from .heads import MistralForCausalLM

LOG = logging.getLogger("mistral.flax")


class Engine:
    """A model's step with NumPy at its border, as `mistral_core.generation.driver` runs it."""

    def __init__(self, model: MistralForCausalLM, compile: str) -> None:
        self.model, self.config = model, model.config
        self.fixed_prompts = self.fixed_caches = compile != "off"
        self.processes = model._processes()
        graph, self.state = nnx.split(as_program(model))
        self._step, self._loop = _compiled(graph, *_put_in(graph)) if self.fixed_caches else _plain(graph)
        self._whole = native.whole_step_of(model) if compile == "auto" else None

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int, dtype: str) -> KVCache:
        """An empty cache; its dtype "auto" is the model's."""
        dtype = self.model.dtype if dtype == "auto" else dtype
        placement = getattr(self.model.base_model, "placement", None)
        device = None if placement is None else placement.activation("BRK", batch)
        cache = KVCache.allocate(
            self.config, batch, capacity, rolling=rolling, lookback=lookback, dtype=dtype, device=device
        )
        # where a step leaves it, so that the first step is the program of those after it
        return cache if placement is None else dataclasses.replace(cache, length=placement.everywhere(cache.length))

    def step(
        self, cache: KVCache, ids_BT: np.ndarray, mask_BT: np.ndarray, rule: Rule, values: Values
    ) -> tuple[driver.Chosen, KVCache]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it.

        `ids_BT` may be embeddings [B, T, D] instead.
        """
        logits = None if self._whole is None else self._whole.tried(ids_BT, mask_BT, cache, every=rule.every)
        if logits is not None:
            count_B = (mask_BT != 0).sum(1, dtype=np.int32)
            cache = cache._with(cache._kept(), cache.length + count_B, cache.capacity)
            if rule.takes_likeliest(values):  # a call of the framework takes as long as a small step
                return driver.Chosen.likeliest(logits, values), cache
            choice = _chosen(logits, rule=rule, values=values)
        else:
            choice, cache = self._run(ids_BT, mask_BT, cache, rule, values)
        return driver.Chosen.of(choice, to_numpy), cache

    def _run(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: KVCache, rule: Rule, values: Values
    ) -> tuple[Choice, KVCache]:
        ids_BT, mask_BT = ids_BT.astype(np.int32) if ids_BT.ndim == 2 else ids_BT, mask_BT.astype(np.int32)
        started, known = time.perf_counter(), self._compilations()
        choice, cache = self._step(self.state, ids_BT, mask_BT, cache, rule=rule, values=values)
        if self._compilations() > known:
            LOG.info("compiled for %d rows of %d tokens in %.1f s", *ids_BT.shape[:2], time.perf_counter() - started)
        return choice, cache

    def loop(
        self, cache: KVCache, token_B: np.ndarray, ended_B: np.ndarray, rule: Rule, values: Values,
        ends: tuple[int, ...], steps: int,
    ) -> tuple[np.ndarray, KVCache]:  # fmt: skip
        """The tokens [B, steps] of so many steps in one compiled loop, which ends early when every row has."""
        room = 1 << (steps - 1).bit_length()  # few sizes, each compiled once
        token_B, ends_E = token_B.astype(np.int32), np.array(ends, np.int32)
        tokens, cache = self._loop(
            self.state, token_B, ended_B, cache, ends_E, np.int32(steps), rule=rule, values=values, room=room
        )
        return to_numpy(tokens)[:, :steps], cache

    def _compilations(self) -> int:
        return self._step._cache_size() if self.fixed_caches else 0

    def stops(self, here: bool) -> bool:
        """Whether the decoding ends after a step: because it does here, or in a process that computes the same rows."""
        return here if self.processes is None else self.processes.any(here)

    def random_seed(self) -> int:
        """A seed where none is given.

        From the operating system, because JAX has no generator of its own; of several processes the first one's counts.
        """
        seed = secrets.randbits(63)
        return seed if self.processes is None else self.processes.number(seed)

    def look(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, embeds_BED: np.ndarray | None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Hidden states and attention weights of a text, without a cache; embeddings stand before the ids."""
        body = self.model.model
        given = {"input_ids": self.array(ids_BT)}
        if embeds_BED is not None:
            embeds, after = self.array(embeds_BED), body.embed_tokens(self.array(ids_BT))
            given = {"inputs_embeds": jnp.concatenate([embeds, after], 1)}
        out = body(
            **given, attention_mask=self.array(mask_BT), use_cache=False, output_attentions=True,
            output_hidden_states=True, return_dict=True,
        )  # fmt: skip
        return out.hidden_states, out.attentions

    def array(self, x: np.ndarray) -> Array:
        """An array of the framework, on the model's device."""
        return jnp.asarray(x, jnp.int32 if x.dtype.kind in "iu" else x.dtype)

    def numpy(self, x: Any) -> np.ndarray:
        """What the framework, or Python, calls an array, in NumPy."""
        return to_numpy(x)


_chosen = jax.jit(choose, static_argnames="rule")


@functools.lru_cache(maxsize=32)
def _compiled(graph: Any, *put_in: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled step and loop of all models of this graph, a model apart from its arrays, and of these calls."""
    step, loop = _plain(graph)
    return (
        jax.jit(step, static_argnames="rule", donate_argnums=3),
        jax.jit(loop, static_argnames=("rule", "room"), donate_argnums=3),
    )


def _put_in(graph: Any) -> list[Any]:
    """What was put into a graph's classes in place of their own calls: a graph names the classes alone."""
    kinds = dict.fromkeys(kind for node in graph.nodes if isinstance(kind := getattr(node, "type", None), type))
    return [kind.__call__ for kind in kinds if not is_as_written(kind, "__call__")]


def _plain(graph: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return functools.partial(_step, graph), functools.partial(_loop, graph)


def _step(
    graph: Any, state: Any, ids_BT: Array, mask_BT: Array, cache: KVCache, *, rule: Rule, values: Values
) -> tuple[Choice, KVCache]:
    """What is chosen after the last column, or each, and the cache after the new tokens."""
    model = nnx.merge(graph, state)
    keep = 0 if rule.every else 1
    out = model(**_given(ids_BT), attention_mask=mask_BT, past_key_values=cache, logits_to_keep=keep, return_dict=True)
    choice, cache = choose(out.logits, rule, values), out.past_key_values
    placement = getattr(model.base_model, "placement", None)
    if placement is not None:  # the driver reads these, in every process
        choice, length_B = placement.everywhere((choice, cache.length))
        cache = dataclasses.replace(cache, length=length_B)
    return choice, cache


def _given(ids_BT: Array) -> dict[str, Array]:
    """Ids [B, T], or embeddings [B, T, D] in their place, as a model's argument."""
    return {"input_ids": ids_BT} if ids_BT.ndim == 2 else {"inputs_embeds": ids_BT}


def _loop(
    graph: Any, state: Any, token_B: Array, ended_B: Array, cache: KVCache, ends_E: Array, steps: Array, *,
    rule: Rule, values: Values, room: int,
) -> tuple[Array, KVCache]:  # fmt: skip
    """The tokens [B, room] of `steps` steps, as far as they go before every row has ended."""

    def going(carry: Any) -> Array:
        count, _, ended_B, _, _ = carry
        return (count < steps) & ~ended_B.all()

    def body(carry: Any) -> Any:
        count, token_B, ended_B, cache, tokens = carry
        now = values._replace(step=values.step + count)
        choice, cache = _step(graph, state, token_B[:, None], ~ended_B[:, None], cache, rule=rule, values=now)
        token_B = choice.token[:, 0]
        ended_B = ended_B | jnp.isin(token_B, ends_E) | (token_B < 0)
        return count + 1, token_B, ended_B, cache, tokens.at[:, count].set(token_B)

    tokens = jnp.zeros((token_B.shape[0], room), jnp.int32)
    carry = jax.lax.while_loop(going, body, (0, token_B, ended_B, cache, tokens))
    return carry[4], carry[3]
