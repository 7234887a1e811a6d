"""What a language model of any framework is to those who generate with it: one driver behind three methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from ..config import MistralConfig
from ..outputs import GenerateOutput
from ..text.stream import beginning
from . import driver
from .options import GenerationConfig

A = TypeVar("A")
"""A framework's array."""


class Generates(Generic[A]):
    """A model that continues text.

    The class of a backend gives the engine that runs its step, and says what NumPy is as an array of its own and back:
    the methods that raise NotImplementedError here.
    """

    config: MistralConfig
    generation_config: GenerationConfig

    # What a backend says

    def _engine(self, compile: str) -> driver.Engine:
        """What runs the model's step, compiled as the option says."""
        raise NotImplementedError

    def _as_numpy(self, x: Any) -> Any:
        """An array of the framework as NumPy, anything else as it is."""
        raise NotImplementedError

    def _as_array(self, x: np.ndarray[Any, Any]) -> A:
        """NumPy as the framework's array, where the model is."""
        raise NotImplementedError

    def _prompt(
        self, input_ids: Any, attention_mask: Any, generation_config: Any, options: Mapping[str, Any]
    ) -> driver.Prompt:
        """Everything that is given to a call, checked."""
        own = self.generation_config
        given = own if generation_config is None else generation_config
        options = {name: self._as_numpy(x) for name, x in options.items()}
        ids, mask = self._as_numpy(input_ids), self._as_numpy(attention_mask)
        return driver.prepare(self.config, ids, mask, given, options, own=own)

    def _own_past(self, prompt: driver.Prompt, past: Any) -> tuple[driver.Prompt, Any]:
        """The prompt and the cache to begin with."""
        return prompt, past

    def _given_back(self, out: GenerateOutput, past: Any) -> GenerateOutput:
        """What was generated, with a cache of the kind that was given."""
        return out

    def _engines(self, assistant: Generates[A] | None, prompt: driver.Prompt) -> tuple[driver.Engine, Any]:
        compile = prompt.generation.compile
        return self._engine(compile), None if assistant is None else assistant._engine(compile)

    def _generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any,
        generation_config: Any,
        past_key_values: Any,
        assistant_model: Any,
        streamer: Any,
        tokenizer: Any,
        **options: Any,
    ) -> A | GenerateOutput:
        with beginning(streamer):
            prompt = self._prompt(input_ids, attention_mask, generation_config, options)
            prompt, past = self._own_past(prompt, past_key_values)
            engine, assistant = self._engines(assistant_model, prompt)
        out = driver.generate(engine, prompt, past=past, assistant=assistant, streamer=streamer, tokenizer=tokenizer)
        returned: A | GenerateOutput = driver.result(engine, prompt, self._given_back(out, past_key_values))
        return returned

    # What users call

    def generate(
        self,
        input_ids: Any = None,
        *,
        attention_mask: Any = None,
        generation_config: Any = None,
        past_key_values: Any = None,
        assistant_model: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> A | GenerateOutput:
        """Continue ids [B, T]: [B, T + new] integers, the prompt as given, ended rows padded, or a GenerateOutput.

        Rows may be padded on either side. `options` are fields of GenerationConfig and come before
        `generation_config`, which comes before the checkpoint's own. `past_key_values` is a KVCache of the rows' first
        tokens, or what an earlier call returned, and is not changed. `assistant_model` is a smaller one that guesses.
        `streamer.put` is told the prompt and each column of new tokens, and may return True to end all rows.
        `tokenizer` is needed for `stop_strings`. Among the options are also the caller's functions
        (`mistral_core.generation.hooks`) and `inputs_embeds`, which stands for the ids or beside them.

        The step is compiled once for each of few shapes, by JAX and TensorFlow whatever `compile` says but "off".
        PyTorch compiles with "on", each shape in some ten seconds, and "auto" does so where there is an accelerator;
        "max" packs a second copy of the weights for the decode step, in a minute or two, and makes it anew when they
        change: for a model that stays as it is. That step is timed beside "auto"'s, and the faster kept.
        Raises GenerationConfigError, EmptyInputError, SequenceTooLongError, TokenIdError, MaskError,
        NonFiniteInputError.
        """
        return self._generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            past_key_values=past_key_values,
            assistant_model=assistant_model,
            streamer=streamer,
            tokenizer=tokenizer,
            **options,
        )

    def stream(
        self,
        input_ids: Any = None,
        *,
        tokenizer: Any,
        attention_mask: Any = None,
        generation_config: Any = None,
        past_key_values: Any = None,
        assistant_model: Any = None,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the continuation of ids [1, T] as text, as soon as it is final; to stop, leave the loop.

        A piece holds no half character, and nothing of a stop string. Options and errors are those of `generate`.
        """
        prompt = self._prompt(input_ids, attention_mask, generation_config, options)
        prompt, past = self._own_past(prompt, past_key_values)
        engine, assistant = self._engines(assistant_model, prompt)
        return driver.stream(engine, prompt, tokenizer=tokenizer, past=past, assistant=assistant)

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> A:
        """The score [B, new] that each new token was chosen by, of what `generate` returned; of beams with its indices.

        `normalize_logits` makes log-probabilities of them. Raises InputError.
        """
        indices = None if beam_indices is None else np.asarray(self._as_numpy(beam_indices))
        found = driver.transition_scores(
            np.asarray(self._as_numpy(sequences)),
            [np.asarray(self._as_numpy(x)) for x in scores],
            indices,
            normalize_logits=normalize_logits,
        )
        return self._as_array(found)
