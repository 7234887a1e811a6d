"""`generate`: the engine that core's one decode driver runs on, compiled or not."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.generation import driver
from mistral_core.generation.sampling import Rule, Values

from . import native
from .arrays import to_numpy
from .cache import KVCache
from .sampling import Choice, choose
from .traces import changed

if TYPE_CHECKING:
    from .heads import MistralForCausalLM

LOG = logging.getLogger("mistral.tf")

_compiled: weakref.WeakKeyDictionary[Any, tuple[Callable[..., Any], ...]] = weakref.WeakKeyDictionary()


class Engine:
    """A model's step with NumPy at its border, as `mistral_core.generation.driver` runs it."""

    def __init__(self, model: MistralForCausalLM, compile: str) -> None:
        self.model, self.config = model, model.config
        self.fixed_prompts = self.fixed_caches = compile != "off"
        self._prefill, self._decode, self._loop = _traced(model) if self.fixed_caches else _plain(model)
        self._whole = native.whole_step_of(model) if compile == "auto" else None

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int, dtype: str) -> KVCache:
        """An empty cache; its dtype "auto" is the model's."""
        dtype = self.model.compute_dtype if dtype == "auto" else dtype
        return KVCache.allocate(self.config, batch, capacity, rolling=rolling, lookback=lookback, dtype=dtype)

    def step(
        self, cache: KVCache, ids_BT: np.ndarray, mask_BT: np.ndarray, rule: Rule, values: Values
    ) -> tuple[driver.Chosen, KVCache]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it.

        `ids_BT` may be embeddings [B, T, D] instead.
        """
        logits = None if self._whole is None else self._whole.tried(ids_BT, mask_BT, cache, every=rule.every)
        if logits is not None:
            count_B = tf.constant((mask_BT != 0).sum(1), cache.length.dtype)
            cache = cache._with(cache._kept(), cache.length + count_B, cache.capacity)
            if rule.takes_likeliest(values):  # a call of the framework takes as long as a small step
                return driver.Chosen.likeliest(logits, values), cache
            choice = _chosen(tf.constant(logits), rule, _tensors(values))
        else:
            choice, cache = self._run(ids_BT, mask_BT, cache, rule, values)
        return driver.Chosen.of(choice, to_numpy), cache

    def _run(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: KVCache, rule: Rule, values: Values
    ) -> tuple[Choice, KVCache]:
        ids_BT, mask_BT = self.array(ids_BT), self.array(mask_BT)
        step = self._decode if ids_BT.shape[1] == 1 or rule.every else self._prefill  # a token and guesses of more
        started, known = time.perf_counter(), self._compilations()
        choice, cache = step(ids_BT, mask_BT, cache, rule, _tensors(values))
        if self._compilations() > known:
            LOG.info("traced for %d rows of %d tokens in %.1f s", *ids_BT.shape[:2], time.perf_counter() - started)
        return choice, cache

    def loop(
        self, cache: KVCache, token_B: np.ndarray, ended_B: np.ndarray, rule: Rule, values: Values,
        ends: tuple[int, ...], steps: int,
    ) -> tuple[np.ndarray, KVCache]:  # fmt: skip
        """The tokens [B, steps] of so many steps in one compiled loop, which ends early when every row has."""
        token_B, ended_B, ends_E = tf.constant(token_B, tf.int32), tf.constant(ended_B), tf.constant(ends, tf.int32)
        tokens, cache = self._loop(token_B, ended_B, cache, ends_E, tf.constant(steps), rule, _tensors(values))
        return to_numpy(tokens), cache

    def _compilations(self) -> int:
        traced = {self._prefill, self._decode} if self.fixed_caches else ()
        return sum(step.experimental_get_tracing_count() for step in traced)

    def stops(self, here: bool) -> bool:
        """Whether the decoding ends after a step: because it does here, or in a process that computes the same rows."""
        return here

    def random_seed(self) -> int:
        """A seed where none is given.

        From TensorFlow's generator, so that keras.utils.set_random_seed decides.
        """
        return int(tf.random.uniform((), maxval=2**63 - 1, dtype=tf.int64))

    def look(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, embeds_BED: np.ndarray | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Hidden states and attention weights of a text, without a cache; embeddings stand before the ids."""
        body = self.model.model
        given = {"input_ids": self.array(ids_BT)}
        if embeds_BED is not None:
            embeds, after = self.array(embeds_BED), body.embed_tokens(self.array(ids_BT))
            given = {"inputs_embeds": tf.concat([tf.cast(embeds, after.dtype), after], 1)}
        out = body(
            **given, attention_mask=self.array(mask_BT), use_cache=False, output_attentions=True,
            output_hidden_states=True, return_dict=True,
        )  # fmt: skip
        return out.hidden_states, out.attentions

    def array(self, x: np.ndarray) -> Tensor:
        """An array of the framework, on the model's device."""
        return tf.constant(x, tf.int32 if x.dtype.kind in "iu" else None)

    def numpy(self, x: Any) -> np.ndarray:
        """What the framework, or Python, calls an array, in NumPy."""
        return to_numpy(x) if tf.is_tensor(x) else np.asarray(x)


_chosen = tf.function(choose, autograph=False)


def _tensors(values: Values) -> Values:
    return Values(*(None if value is None else tf.constant(value) for value in values))


def _traced(model: MistralForCausalLM) -> tuple[Callable[..., Any], ...]:
    """The traced steps of a text and of what follows, and the loop, kept as long as the model stays as it is."""
    if changed(model, "generate") or model not in _compiled:
        prefill, decode, loop = _plain(weakref.proxy(model))
        # XLA on a CPU runs a small step faster, once it has compiled it, which a text that is read once does not repay;
        # it copies 16-bit weights to float32, and packed ones too
        whole = _is_float32_on_cpu(model) and not any(model.packed_parts())
        small = tf.function(decode, jit_compile=True if whole else None, autograph=False)
        _compiled[model] = tf.function(prefill, autograph=False), small, tf.function(loop, autograph=False)
    return _compiled[model]


def _plain(model: Any) -> tuple[Callable[..., Any], ...]:
    step = functools.partial(_step, model)
    return step, step, functools.partial(_loop, model)


def _is_float32_on_cpu(model: MistralForCausalLM) -> bool:
    devices = tf.config.list_logical_devices()
    return model.compute_dtype == "float32" and all(device.device_type == "CPU" for device in devices)


def _step(
    model: MistralForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache, rule: Rule, values: Values
) -> tuple[Choice, KVCache]:
    """What is chosen after the last column, or each, and the cache after the new tokens."""
    keep = 0 if rule.every else 1
    out = model(**_given(ids_BT), attention_mask=mask_BT, past_key_values=cache, logits_to_keep=keep, return_dict=True)
    return choose(out.logits, rule, values), out.past_key_values


def _given(ids_BT: Tensor) -> dict[str, Tensor]:
    """Ids [B, T], or embeddings [B, T, D] in their place, as a model's argument."""
    return {"input_ids": ids_BT} if len(ids_BT.shape) == 2 else {"inputs_embeds": ids_BT}


def _loop(
    model: MistralForCausalLM, token_B: Tensor, ended_B: Tensor, cache: KVCache, ends_E: Tensor, steps: Tensor,
    rule: Rule, values: Values,
) -> tuple[Tensor, KVCache]:  # fmt: skip
    """The tokens [B, steps], as far as they go before every row has ended."""

    def going(count: Tensor, token_B: Tensor, ended_B: Tensor, *_: Any) -> Tensor:
        return (count < steps) & ~tf.reduce_all(ended_B)

    def body(count: Tensor, token_B: Tensor, ended_B: Tensor, cache: KVCache, tokens: Any) -> Any:
        now = values._replace(step=values.step + count)
        mask_B1 = tf.cast(~ended_B[:, None], tf.int32)
        choice, cache = _step(model, token_B[:, None], mask_B1, cache, rule, now)
        token_B = choice.token[:, 0]
        ended_B = ended_B | tf.reduce_any(token_B[:, None] == ends_E, 1) | (token_B < 0)
        return count + 1, token_B, ended_B, cache, tokens.write(count, token_B)

    tokens = tf.TensorArray(tf.int32, steps, element_shape=token_B.shape)
    start = tf.constant(0), token_B, ended_B, cache, tokens
    *_, cache, tokens = tf.while_loop(going, body, start)
    return tf.transpose(tokens.stack()), cache
