"""`generate`: the engine that core's one decode driver runs on, compiled or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mistral_core.errors import UnsupportedFeatureError
from mistral_core.generation import driver
from mistral_core.generation.sampling import Rule, Values

from . import native
from .arrays import from_numpy, to_numpy
from .cache import KVCache
from .compiled import choices, compiled, fastest, let_go
from .products import converted, product
from .sampling import Choice, choose

if TYPE_CHECKING:
    from .heads import MistralForCausalLM

FEW_COLUMNS = 16
"""The most columns of a step that is frozen: a token and guesses, not a prompt."""
IN_C = "in C"


@contextlib.contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """A context in which no part of a model trains; afterwards each does that did."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Engine:
    """A model's step with NumPy at its border, as `mistral_core.generation.driver` runs it."""

    def __init__(self, model: MistralForCausalLM, compile: str) -> None:
        self.model, self.config = model, model.config_here
        self._together = model._together()
        if self._together is not None and compile in ("on", "max"):
            raise UnsupportedFeatureError(
                f"compile={compile!r}: a model that is cut over processes decodes as it is; leave it out, or compile "
                "the layers: `for layer in model.model.layers: layer.compile()`."
            )
        on_cpu = model.device.type == "cpu"
        # of packed weights, freezing would make floats for good
        self._frozen = compile == "max" and next(model.packed_parts(), None) is None
        self.fixed_caches = compile in ("on", "max") or (compile == "auto" and not on_cpu and self._together is None)
        self.fixed_prompts = self.fixed_caches and not self._frozen
        self._head = model.lm_head.weight.detach() if _is_plain(model) and _is_plain(model.lm_head) else None
        self._whole = native.whole_step_of(model) if on_cpu and compile in ("auto", "max") else None
        self._measures = compile == "max"
        if self._head is not None and self._whole is None and not self.fixed_caches:
            self._head = converted(self._head)
        self._step: Any = None

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int, dtype: str) -> KVCache:
        """An empty cache; its dtype "auto" is the model's."""
        return KVCache.allocate(
            self.config,
            batch,
            capacity,
            rolling=rolling,
            lookback=lookback,
            dtype=self.model.dtype if dtype == "auto" else dtype,
            device=self.model.device,
        )

    @torch.no_grad()
    def step(
        self, cache: KVCache, ids_BT: np.ndarray, mask_BT: np.ndarray, rule: Rule, values: Values
    ) -> tuple[driver.Chosen, KVCache]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it.

        `ids_BT` may be embeddings [B, T, D] instead.
        """
        given = ids_BT, mask_BT, cache, rule, values
        found = None if self._measures and self._torch_is_faster(*given) else self._in_c(*given)
        choice, cache = self._in_torch(*given) if found is None else found
        return driver.Chosen.of(choice, to_numpy), cache

    def _torch_is_faster(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: KVCache, rule: Rule, values: Values
    ) -> bool:
        """Whether a step in torch, compiled, is faster than in C: measured at the first step of its kind.

        Each writes the same tokens into the same slots of the cache, so that both may run.
        """
        known, kind = choices(self.model), (tuple(ids_BT.shape), cache.dtype)
        if kind not in known:
            given = ids_BT, mask_BT, cache, rule, values
            if self._in_c(*given) is None:
                return True
            in_c, in_torch = functools.partial(self._in_c, *given), functools.partial(self._in_torch, *given)
            known[kind] = fastest(kind, {IN_C: in_c, "compiled": in_torch})
            if known[kind] == IN_C:  # a second copy of the weights is of no use
                self._step = None
                let_go(self.model, _step)
        return known[kind] != IN_C

    def _in_c(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: KVCache, rule: Rule, values: Values
    ) -> tuple[Choice, KVCache] | None:
        """A step in one call of C; None where it computes no such step."""
        logits = None if self._whole is None else self._whole.tried(ids_BT, mask_BT, cache, every=rule.every)
        if logits is None:
            return None
        after = cache._with(cache._kept(), cache.length + from_numpy((mask_BT != 0).sum(1)), cache.capacity)
        return choose(from_numpy(logits), rule, self._on_device(values)), after

    def _in_torch(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, cache: KVCache, rule: Rule, values: Values
    ) -> tuple[Choice, KVCache]:
        """A step in torch's operations, compiled or not."""
        ids_BT, mask_BT, values = (self._on_device(x) for x in (ids_BT, mask_BT, values))
        with without_dropout(self.model):
            return self._run(ids_BT, mask_BT, cache, rule, values)

    def _run(self, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache, rule: Rule, values: Values) -> Any:
        if not self.fixed_caches:
            return _step(self.model, self._head, ids_BT, mask_BT, cache, rule, values)
        caches = cache.dtype, *(keys.shape[1] for keys in cache.keys)
        kind = tuple(ids_BT.shape), caches, rule, values.bias is None, values.seen is None
        # each frozen shape would pack a copy of the weights of its own
        if self._frozen and ids_BT.shape[1] > FEW_COLUMNS:
            if self._head is None:
                return _step(self.model, None, ids_BT, mask_BT, cache, rule, values)
            x_BTD, cache = _hidden(self.model, ids_BT, mask_BT, cache, rule)
            return compiled(self.model, _chosen)(
                x_BTD, self._head, rule, values, kind=(tuple(x_BTD.shape), *kind[2:])
            ), cache
        if self._step is None:  # after the prompt, which need not wait until frozen weights have been looked at
            self._step = compiled(self.model, _step, frozen=self._frozen)
        return self._step(self.model, self._head, ids_BT, mask_BT, cache, rule, values, kind=kind)

    def loop(
        self, cache: KVCache, token_B: np.ndarray, ended_B: np.ndarray, rule: Rule, values: Values,
        ends: tuple[int, ...], steps: int,
    ) -> tuple[np.ndarray, KVCache]:  # fmt: skip
        """The tokens [B, steps] of so many steps in one compiled loop, which ends early when every row has.

        Raises UnsupportedFeatureError: PyTorch has none.
        """
        raise UnsupportedFeatureError(
            "on_device_loop: PyTorch has no compiled loop; leave it out, on a GPU compile='on' replays CUDA graphs."
        )

    def stops(self, here: bool) -> bool:
        """Whether the decoding ends after a step: because it does here, or in a process that computes the same rows."""
        return here if self._together is None else self._together.stops(here)

    def random_seed(self) -> int:
        """A seed where none is given.

        From torch's generator, so that torch.manual_seed decides; of several processes, the first one's.
        """
        seed = torch.randint(2**63 - 1, ())
        return int(seed if self._together is None else self._together.of_first(seed))

    @torch.no_grad()
    def look(
        self, ids_BT: np.ndarray, mask_BT: np.ndarray, embeds_BED: np.ndarray | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Hidden states and attention weights of a text, without a cache; embeddings stand before the ids."""
        given = {"input_ids": self.array(ids_BT)}
        if embeds_BED is not None:
            embeds, after = self.array(embeds_BED), self.model.model.embed_tokens(self.array(ids_BT))
            given = {"inputs_embeds": torch.cat([embeds.to(after.dtype), after], 1)}
        with without_dropout(self.model):
            out = self.model(
                **given, attention_mask=self.array(mask_BT), use_cache=False, output_attentions=True,
                output_hidden_states=True, logits_to_keep=1, return_dict=True,
            )  # fmt: skip
        return out.hidden_states, out.attentions

    def array(self, x: np.ndarray) -> Tensor:
        """An array of the framework, on the model's device."""
        return from_numpy(x).to(self.model.device)

    def numpy(self, x: Any) -> np.ndarray:
        """What the framework, or Python, calls an array, in NumPy."""
        return to_numpy(x) if isinstance(x, Tensor) else np.asarray(x)

    def _on_device(self, x: Any) -> Any:
        if isinstance(x, Values):
            return Values(*map(self._on_device, x))
        # a copy: one row cut out of several columns keeps the strides of all, for which torch would compile anew
        return None if x is None else from_numpy(x.copy()).to(self.model.device)


def _step(
    model: MistralForCausalLM,
    head_VD: Tensor | None,
    ids_BT: Tensor,
    mask_BT: Tensor,
    cache: KVCache,
    rule: Rule,
    values: Values,
) -> tuple[Choice, KVCache]:
    """What is chosen after the last column, or each, and the cache after the new tokens.

    The weight of a plain head is an argument, not a parameter, so that freezing does not make it float32. Without
    one the model is called, with whatever was put into its place, around it or before it.
    """
    if head_VD is None:
        keep = 0 if rule.every else 1
        out = model(
            **_given(ids_BT), attention_mask=mask_BT, past_key_values=cache, logits_to_keep=keep, return_dict=True
        )
        return choose(out.logits, rule, values), out.past_key_values
    x_BTD, cache = _hidden(model, ids_BT, mask_BT, cache, rule)
    return _chosen(x_BTD, head_VD, rule, values), cache


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class here says and no more: no hook, no wrapper, no other forward."""
    return type(module).__module__ in (f"{__package__}.heads", f"{__package__}.layers") and native.is_plain(module)


def _hidden(
    model: MistralForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache, rule: Rule
) -> tuple[Tensor, KVCache]:
    """What the tokens are chosen from, before the head, and the cache after the new ones."""
    out = model.model(**_given(ids_BT), attention_mask=mask_BT, past_key_values=cache, return_dict=True)
    return out.last_hidden_state if rule.every else out.last_hidden_state[:, -1:], out.past_key_values


def _given(ids_BT: Tensor) -> dict[str, Tensor]:
    """Ids [B, T], or embeddings [B, T, D] in their place, as a model's argument."""
    return {"input_ids": ids_BT} if ids_BT.ndim == 2 else {"inputs_embeds": ids_BT}


def _chosen(x_BTD: Tensor, head_VD: Tensor, rule: Rule, values: Values) -> Choice:
    return choose(product(x_BTD, head_VD, dtype=torch.float32), rule, values)
