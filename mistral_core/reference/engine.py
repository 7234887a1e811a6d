"""The reference as an engine of the decode driver: generation in float64 NumPy, the specification of `generate`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..generation import GenerationConfig, driver
from ..generation.sampling import Rule, Values
from ..outputs import GenerateOutput
from . import heads
from .cache import KVCache
from .heads import Parameters
from .sampling import choose


class Engine:
    """One step of the float64 model."""

    fixed_prompts = fixed_caches = False

    def __init__(self, config: MistralConfig, parameters: Parameters) -> None:
        self.config, self.parameters = config, parameters

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int, dtype: str) -> KVCache:
        """An empty cache."""
        dtype = "float64" if dtype == "auto" else dtype
        return KVCache.allocate(self.config, batch, capacity, rolling=rolling, lookback=lookback, dtype=dtype)

    def step(
        self, cache: KVCache, ids_BT: Array, mask_BT: Array, rule: Rule, values: Values
    ) -> tuple[driver.Chosen, KVCache]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it."""
        given = {"input_ids": ids_BT} if ids_BT.ndim == 2 else {"inputs_embeds": ids_BT.astype(np.float64)}
        out = heads.causal_lm(self.config, self.parameters, **given, attention_mask=mask_BT, past_key_values=cache)
        assert out.logits is not None
        logits = out.logits if rule.every else out.logits[:, -1:]
        choice = choose(logits, rule, values)
        scores = None if choice.scores is None else choice.scores.astype(np.float32)
        logits = logits if rule.logits else None
        return driver.Chosen(choice.token, scores, choice.candidates, logits), out.past_key_values

    def loop(
        self, cache: KVCache, token_B: Array, ended_B: Array, rule: Rule, values: Values, ends: tuple[int, ...],
        steps: int,
    ) -> tuple[Array, KVCache]:  # fmt: skip
        """The tokens of so many steps [B, steps]; of ended rows, what comes after their end is not said."""
        tokens = np.zeros((len(token_B), steps), np.int64)
        for step in range(steps):
            if ended_B.all():
                break
            chosen, cache = self.step(cache, token_B[:, None], ~ended_B[:, None], rule, values)
            token_B = tokens[:, step] = chosen.token[:, 0]
            ended_B = ended_B | np.isin(token_B, ends)
            values = values._replace(step=values.step + 1)
        return tokens, cache

    def stops(self, here: bool) -> bool:
        """Whether the decoding ends after a step: here is the only process."""
        return here

    def random_seed(self) -> int:
        """A seed from the operating system."""
        return int(np.random.default_rng().integers(2**63))

    def look(self, ids_BT: Array, mask_BT: Array, embeds_BED: Array | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Hidden states and attention weights of a text, without a cache; embeddings stand before the ids."""
        given: dict[str, Any] = {"input_ids": ids_BT}
        if embeds_BED is not None:
            ids_embeds = np.asarray(self.parameters["model.embed_tokens.weight"])[ids_BT]
            given = {"inputs_embeds": np.concatenate([embeds_BED, ids_embeds], axis=1, dtype=np.float64)}
        out = heads.causal_lm(self.config, self.parameters, **given, attention_mask=mask_BT)
        return out.hidden_states or (), out.attentions or ()

    def array(self, x: Array) -> Array:
        """An array of the framework, which is NumPy."""
        return x

    def numpy(self, x: Any) -> Array:
        """What Python calls an array, in NumPy."""
        return np.asarray(x)


def generate(
    config: MistralConfig,
    parameters: Parameters,
    input_ids: Any,
    *,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> GenerateOutput:
    """What every backend's `generate` must return, as NumPy arrays, whatever `return_dict_in_generate` is."""
    given = generation_config or GenerationConfig.from_model_config(config)
    prompt = driver.prepare(config, input_ids, attention_mask, given, options)
    return driver.generate(Engine(config, parameters), prompt, past=past_key_values)
