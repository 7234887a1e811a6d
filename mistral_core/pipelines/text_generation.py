"""How a text or a conversation goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, SequenceTooLongError, UnsupportedFeatureError
from ..generation import IGNORED, GenerationConfig
from ..text.stream import TextStream
from .base import Pipeline, check_names, check_one_of, padded

DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""As in transformers: where neither the call nor the checkpoint's generation config says otherwise."""
OF_GENERATE = {field.name for field in dataclasses.fields(GenerationConfig)} - {"extra"} | {*IGNORED}
ONLY_GENERATE = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "past_key_values",
)  # fmt: skip
"""What concerns arrays: for who calls `generate`."""

Chat = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TextGenerationOptions:
    """What a call takes besides the options of `generate`, which are in `generate`."""

    return_full_text: bool = True
    return_tensors: bool = False
    skip_special_tokens: bool = True
    clean_up_tokenization_spaces: bool = False
    prefix: str = ""
    add_special_tokens: bool = True
    handle_long_generation: str | None = None
    stop_sequence: str | Sequence[str] | None = None
    tools: Any = None
    continue_final_message: bool | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] = field(default_factory=dict)
    streamer: Any = None
    assistant_model: Any = None
    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Any = None
    generation_config: Any = None
    generate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_one_of("handle_long_generation", self.handle_long_generation, (None, "hole"))
        if self.clean_up_tokenization_spaces:
            raise UnsupportedFeatureError("clean_up_tokenization_spaces: it would change the text; leave it out.")


class PipelineInput(NamedTuple):
    """A text or a conversation and its ids."""

    given: Any
    ids: list[int]
    continues: bool
    """Whether what is made goes on with the last words given; else it is a message of its own."""


class TextGenerationPipeline(Pipeline):
    """`[{"generated_text": ...}]` for a text, or for a chat, a list of `{"role": ..., "content": ...}`.

    The text, or the conversation with the answer as its last message (a last message of the assistant is continued);
    with `return_full_text=False` what is new alone, with `return_tensors=True` `generated_token_ids`, all of them. A
    list gives a list of such lists, each of `num_return_sequences`. All options of `generate` are taken; without any,
    and where the checkpoint has none of its own, up to 256 tokens are sampled at temperature 0.7, as in transformers:
    pass `do_sample=False` for the likeliest text, `seed=` for one that comes again. `stop_sequence` is a text or
    several that end it, `prefix` stands before each text, `tools` and `tokenizer_encode_kwargs` go to the chat
    template. A prompt that leaves no room for what is asked for is an error; `handle_long_generation="hole"` keeps
    its special tokens and as much of its end as fits.

    Other than in transformers, a prompt's result does not depend on its batch: each is continued as if alone, with
    `seed` too, and padding is not among the ids. Control tokens in a text are text.
    """

    task = "text-generation"
    architecture = "MistralForCausalLM"
    options_class = TextGenerationOptions
    _expected = "a str or a chat (a list of messages with role and content)"

    def _chosen(self, given: Mapping[str, Any]) -> TextGenerationOptions:
        own = {field.name for field in dataclasses.fields(TextGenerationOptions)} - {"generate"}
        check_names(self.task, given, own | OF_GENERATE - {*ONLY_GENERATE}, "; for arrays call model.generate")
        generate = {name: value for name, value in given.items() if name not in own}
        options = {name: value for name, value in given.items() if name in own}
        return dataclasses.replace(self._defaults, **options, generate={**self._defaults.generate, **generate})

    def _is_one(self, inputs: Any, options: TextGenerationOptions) -> bool:
        return isinstance(inputs, str) or _is_chat(inputs)

    def _batch(self, items: list[Any], options: TextGenerationOptions, size: int) -> Iterator[list[dict[str, Any]]]:
        generation = self._generation(options)
        prompts = [self._prompt(item, options, generation) for item in items]
        if generation.max_length is None:
            yield from self._continued(prompts, options, generation)
            return
        for prompt in prompts:  # the limit leaves each of them another number of new tokens
            yield from self._continued([prompt], options, generation)

    def _generation(self, options: TextGenerationOptions) -> GenerationConfig:
        """The options of `generate` in force."""
        config = options.generation_config
        if config is None:
            config, plain = self.model.generation_config, GenerationConfig()
            unset = {key: value for key, value in DEFAULTS.items() if getattr(config, key) == getattr(plain, key)}
            if config.max_length is not None:
                unset.pop("max_new_tokens", None)
            config = config.replace(**unset)
        else:
            config = GenerationConfig.of(config).over(self.model.generation_config)
        stops = {} if options.stop_sequence is None else {"stop_strings": options.stop_sequence}
        given = config.replace(**stops, **options.generate)
        if isinstance(given.seed, tuple):
            raise InputError(f"seed must be an int, with which each prompt is continued as if alone, got {given.seed}.")
        return given

    def _prompt(self, item: Any, options: TextGenerationOptions, generation: GenerationConfig) -> PipelineInput:
        if isinstance(item, str):
            ids = self.tokenizer.encode(options.prefix + item, add_special_tokens=options.add_special_tokens)
            return PipelineInput(item, self._fitting(ids, options, generation), True)
        if not _is_chat(item):
            raise InputError(f"{self.task} must be given {self._expected}, got {type(item).__name__}.")
        continues = options.continue_final_message
        if continues is None:
            continues = item[-1].get("role") == "assistant"
        chat = {"add_generation_prompt": not continues, "continue_final_message": continues}
        if options.tools is not None:
            chat["tools"] = options.tools
        ids = self.tokenizer.apply_chat_template(list(item), **chat, **options.tokenizer_encode_kwargs)
        return PipelineInput(item, self._fitting(ids, options, generation, is_chat=True), continues)

    def _fitting(
        self, ids: Sequence[int], options: TextGenerationOptions, generation: GenerationConfig, *, is_chat: bool = False
    ) -> list[int]:
        """The ids, or what of them leaves room for what is to come; raises SequenceTooLongError."""
        ids = list(map(int, ids))
        new = generation.max_new_tokens if generation.max_length is None else max(generation.max_length - len(ids), 0)
        room = self.model.config.max_position_embeddings - new
        if len(ids) <= room:
            return ids
        special = ids[: next((at for at, token in enumerate(ids) if token != self.tokenizer.bos_token_id), len(ids))]
        if is_chat or options.handle_long_generation is None or room <= len(special):
            advice = "drop messages" if is_chat else "shorten it, or pass handle_long_generation='hole'"
            raise SequenceTooLongError(
                f"{self.task}: a prompt of {len(ids)} tokens and {new} new ones, max_position_embeddings is "
                f"{self.model.config.max_position_embeddings}; ask for fewer new tokens, {advice}."
            )
        return special + ids[len(ids) - room + len(special) :]

    def _continued(
        self, prompts: list[PipelineInput], options: TextGenerationOptions, generation: GenerationConfig
    ) -> Iterator[list[dict[str, Any]]]:
        ids_BT, mask_BT = padded([prompt.ids for prompt in prompts], side="left")
        alike = {} if generation.seed is None else {"seed": (generation.seed,) * len(prompts)}
        with self.backend.inference(self.model):
            out = self.model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=generation.replace(**alike, return_dict_in_generate=True, output_scores=False),
                streamer=options.streamer,
                assistant_model=options.assistant_model,
                logits_processor=options.logits_processor,
                stopping_criteria=options.stopping_criteria,
                prefix_allowed_tokens_fn=options.prefix_allowed_tokens_fn,
                tokenizer=self.tokenizer,
            )
        sequences, masks = (np.asarray(self.backend.to_numpy(out[name])) for name in ("sequences", "attention_mask"))
        rows = [row[real != 0].tolist() for row, real in zip(sequences, masks, strict=True)]
        copies = len(rows) // len(prompts)
        for index, prompt in enumerate(prompts):
            yield [self._record(prompt, row, options) for row in rows[index * copies : (index + 1) * copies]]

    def _record(self, prompt: PipelineInput, row: list[int], options: TextGenerationOptions) -> dict[str, Any]:
        if options.return_tensors:
            return {"generated_token_ids": row}
        after = prompt.ids if prompt.continues else []
        stream = TextStream(self.tokenizer, after=after, skip_special_tokens=options.skip_special_tokens)
        new = "".join([stream.push(token) for token in row[len(prompt.ids) :]]) + stream.end()
        if not options.return_full_text:
            return {"generated_text": new}
        if isinstance(prompt.given, str):
            return {"generated_text": prompt.given + new}
        return {"generated_text": _with_answer(prompt.given, new, continues=prompt.continues)}


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)


def _with_answer(chat: Chat, text: str, *, continues: bool) -> list[dict[str, Any]]:
    """A conversation and its answer; the messages given stay as they are."""
    messages = [dict(message) for message in chat]
    if not continues:
        return [*messages, {"role": "assistant", "content": text}]
    content = messages[-1].get("content") or ""
    more = [*content, {"type": "text", "text": text}] if isinstance(content, list) else content + text
    return [*messages[:-1], {**messages[-1], "content": more}]
