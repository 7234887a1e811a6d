"""`generate`: the engine that core's one decode driver runs on, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mistral_core import GenerationConfig, decoding
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.outputs import GenerateOutput
from mistral_core.sampling import Rule, Values

from .arrays import to_numpy
from .cache import KVCache
from .compiled import compiled
from .layers import project
from .sampling import Choice, choose

if TYPE_CHECKING:
    from .heads import MistralForCausalLM

FEW = 16
"""The most columns of a step that is frozen: a token and guesses, not a prompt."""


def generate(
    model: MistralForCausalLM,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    past_key_values: KVCache | GenerateOutput | None = None,
    assistant_model: MistralForCausalLM | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Tensor | GenerateOutput:
    """Continue ids [B, T]: [B, T + new] int64, the prompt as given, ended rows padded, or a GenerateOutput.

    Rows may be padded on either side. `options` are fields of GenerationConfig and come before `generation_config`,
    which comes before the checkpoint's own. `past_key_values` is a cache of the rows' first tokens, or what an earlier
    call returned, and is not changed. `streamer.put` is told the prompt and each column of new tokens, and may return
    True to end all rows. `tokenizer` is needed for `stop_strings`. `compile="on"` compiles each shape once, in some ten
    seconds, and "auto" does so where there is an accelerator; "max" packs a second copy of the weights for the decode
    step, in a minute or two, and makes it anew when they change: for a model that stays as it is.
    Raises GenerationConfigError, EmptyInputError, SequenceTooLongError, TokenIdError, MaskError, NonFiniteInputError.
    """
    prompt = _prompt(model, input_ids, attention_mask, generation_config, options)
    compile = prompt.generation.compile
    out = decoding.generate(
        Engine(model, compile),
        prompt,
        past=past_key_values,
        assistant=None if assistant_model is None else Engine(assistant_model, compile),
        streamer=streamer,
        tokenizer=tokenizer,
    )
    sequences = torch.from_numpy(out.sequences).to(model.device)
    if not prompt.generation.return_dict_in_generate:
        return sequences
    return out._replace(
        sequences=sequences,
        attention_mask=torch.from_numpy(out.attention_mask).to(model.device),
        scores=None if out.scores is None else tuple(torch.from_numpy(x).to(model.device) for x in out.scores),
        sequences_scores=None if out.sequences_scores is None else torch.from_numpy(out.sequences_scores),
    )


def stream(
    model: MistralForCausalLM,
    input_ids: Any,
    *,
    tokenizer: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    past_key_values: KVCache | GenerateOutput | None = None,
    assistant_model: MistralForCausalLM | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield the continuation of ids [1, T] as text, as soon as it is final; to stop, leave the loop.

    A piece holds no half character, and nothing of a stop string. Options and errors are those of `generate`.
    """
    prompt = _prompt(model, input_ids, attention_mask, generation_config, options)
    compile = prompt.generation.compile
    return decoding.stream(
        Engine(model, compile),
        prompt,
        tokenizer=tokenizer,
        past=past_key_values,
        assistant=None if assistant_model is None else Engine(assistant_model, compile),
    )


def _prompt(
    model: MistralForCausalLM,
    input_ids: Any,
    attention_mask: Any,
    generation_config: GenerationConfig | None,
    options: dict[str, Any],
) -> decoding.Prompt:
    return decoding.prepare(
        model.config,
        to_numpy(input_ids) if isinstance(input_ids, Tensor) else input_ids,
        to_numpy(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask,
        generation_config or model.generation_config,
        options,
    )


class Engine:
    """A model's step with NumPy at its border, as `mistral_core.decoding` runs it."""

    def __init__(self, model: MistralForCausalLM, compile: str) -> None:
        self.model, self.config = model, model.config
        on_cpu = model.device.type == "cpu"
        self._frozen = compile == "max"
        self.fixed_caches = compile in ("on", "max") or (compile == "auto" and not on_cpu)
        self.fixed_prompts = self.fixed_caches and not self._frozen
        self._head = model.lm_head.weight.detach() if _is_plain(model) and _is_plain(model.lm_head) else None
        if self._head is not None and on_cpu and not self.fixed_caches:
            self._head = self._head.float()  # once, not for each token
        self._step: Any = None

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int) -> KVCache:
        """An empty cache."""
        return KVCache.allocate(
            self.config,
            batch,
            capacity,
            rolling=rolling,
            lookback=lookback,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    @torch.no_grad()
    def step(
        self, cache: KVCache, ids_BT: np.ndarray, mask_BT: np.ndarray, rule: Rule, values: Values
    ) -> tuple[decoding.Chosen, KVCache]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it."""
        ids_BT, mask_BT, values = (self._on_device(x) for x in (ids_BT, mask_BT, values))
        choice, cache = self._run(ids_BT, mask_BT, cache, rule, values)
        scores = None if choice.scores is None else to_numpy(choice.scores)
        candidates = None if choice.candidates is None else tuple(map(to_numpy, choice.candidates))
        return decoding.Chosen(to_numpy(choice.token), scores, candidates), cache

    def _run(self, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache, rule: Rule, values: Values) -> Any:
        if not self.fixed_caches:
            return _step(self.model, self._head, ids_BT, mask_BT, cache, rule, values)
        slots = tuple(keys.shape[1] for keys in cache.keys)
        kind = tuple(ids_BT.shape), slots, rule, values.bias is None, values.seen is None
        if self._frozen and ids_BT.shape[1] > FEW:  # each frozen shape would pack a copy of the weights of its own
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

    def random_seed(self) -> int:
        """A seed where none is given.

        From torch's generator, so that torch.manual_seed decides.
        """
        return int(torch.randint(2**63 - 1, ()))

    def _on_device(self, x: Any) -> Any:
        if isinstance(x, Values):
            return Values(*map(self._on_device, x))
        # a copy: one row cut out of several columns keeps the strides of all, for which torch would compile anew
        return None if x is None else torch.from_numpy(x.copy()).to(self.model.device)


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
        out = model(ids_BT, mask_BT, past_key_values=cache, logits_to_keep=0 if rule.every else 1, return_dict=True)
        return choose(out.logits, rule, values), out.past_key_values
    x_BTD, cache = _hidden(model, ids_BT, mask_BT, cache, rule)
    return _chosen(x_BTD, head_VD, rule, values), cache


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class here says and no more: no hook, no wrapper, no other forward."""
    own = type(module).__module__ in (f"{__package__}.heads", f"{__package__}.layers") and "forward" not in vars(module)
    return own and not (module._forward_hooks or module._forward_pre_hooks or nn.modules.module._has_any_global_hook())


def _hidden(
    model: MistralForCausalLM, ids_BT: Tensor, mask_BT: Tensor, cache: KVCache, rule: Rule
) -> tuple[Tensor, KVCache]:
    """What the tokens are chosen from, before the head, and the cache after the new ones."""
    out = model.model(ids_BT, mask_BT, past_key_values=cache, return_dict=True)
    return out.last_hidden_state if rule.every else out.last_hidden_state[:, -1:], out.past_key_values


def _chosen(x_BTD: Tensor, head_VD: Tensor, rule: Rule, values: Values) -> Choice:
    return choose(project(x_BTD, head_VD), rule, values)
