"""The one decode driver: prefill, step, stopping, speculation and streaming over a backend's engine.

A token depends on the text before it and on its own noise, not on how it was computed: chunks, padding, batch and
guesses change the speed only. Every row holds its real tokens; what is padding in a prompt is left out before anything
is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import beam_search, validate
from .config import MistralConfig
from .engine import Chosen, Engine, Prompt, begin, expanded, feed, piece_widths
from .errors import GenerationConfigError, InputError, NonFiniteInputError
from .generation import GenerationConfig, check_prompt
from .outputs import GenerateOutput
from .reference.sampling import row_keys
from .sampling import Rule, Values, numbers
from .speculation import Assistant, prompt_lookup
from .text.stream import StoppingStream
from .token_history import limits
from .validate import Array

__all__ = ["Chosen", "Engine", "Prompt", "decode", "generate", "prepare", "stream"]


class Step(NamedTuple):
    """The new tokens of each row, none where it has ended, and the scores [V] they were chosen from, if asked for."""

    tokens: list[list[int]]
    scores: list[list[Array]]


Decode = Generator[Step, bool | None, Any]
"""Steps, and at their end the cache; what is sent back after a step says whether it was the last."""


class Guess(NamedTuple):
    """Where guesses of the next tokens come from."""

    most: int
    """The most of them for a row and step; 0: none are made."""
    propose: Callable[[list[list[int]], list[int]], list[list[int]]]
    """Rows and how many are wanted for each -> guesses of what comes next."""


def prepare(
    config: MistralConfig,
    input_ids: Any,
    attention_mask: Any,
    generation: GenerationConfig,
    options: dict[str, Any],
) -> Prompt:
    """Ids and mask as int64 [B, T] and the options in force, all checked."""
    ids_BT = validate.integers("input_ids", input_ids)
    generation = generation.replace(**options).for_prompt(ids_BT.shape[1])
    generation.check(config)
    mask_BT = np.ones_like(ids_BT) if attention_mask is None else validate.mask(attention_mask)
    validate.check_call(config, input_ids=ids_BT, attention_mask=mask_BT)
    check_prompt(config, generation, mask_BT)
    return Prompt(ids_BT, mask_BT, generation)


def generate(
    engine: Engine,
    prompt: Prompt,
    *,
    past: Any = None,
    assistant: Engine | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
) -> GenerateOutput:
    """Continue every row: NumPy sequences [B, T + new], the prompt as given, ended rows padded.

    `past` is a cache of the first tokens of every row, or what an earlier call returned, of which every row's common
    beginning is used. `streamer` is told the prompt and each column of new tokens, and may return True to end all rows.
    """
    generation = prompt.generation
    if generation.num_beams > 1:
        return beam_search.generate(engine, prompt, past=past, assistant=assistant, streamer=streamer)
    copies = generation.num_return_sequences
    made: list[list[int]] = [[] for _ in range(len(prompt.ids) * copies)]
    scores: list[list[Array]] = [[] for _ in made]
    put = 0
    stop: bool | None = None
    if streamer is not None:
        streamer.put(prompt.ids)
    try:
        running = decode(engine, prompt, past=past, assistant=assistant, tokenizer=tokenizer)
        while True:
            try:
                step = running.send(stop)
            except StopIteration as end:
                cache = end.value
                break
            for row, (tokens, distributions) in enumerate(zip(*step, strict=True)):
                made[row] += tokens
                scores[row] += distributions
            going = [len(row) for row, tokens in zip(made, step.tokens, strict=True) if tokens]
            while streamer is not None and put < min(going, default=0):
                stop = streamer.put(_column(made, put, generation.padding)) or stop
                put += 1
        new = max(len(row) for row in made)
        while streamer is not None and put < new:
            streamer.put(_column(made, put, generation.padding))
            put += 1
    finally:
        if streamer is not None:
            streamer.end()
    new_mask = np.arange(new) < np.array([len(row) for row in made])[:, None]
    columns = [_column(made, column, generation.padding) for column in range(new)]
    return GenerateOutput(
        np.column_stack([np.repeat(prompt.ids, copies, axis=0), *columns]),
        np.column_stack([np.repeat(prompt.mask, copies, axis=0), new_mask.astype(np.int64)]),
        _score_columns(scores, new, engine.config.vocab_size, generation.padding) if generation.output_scores else None,
        None,
        cache,
    )


def stream(engine: Engine, prompt: Prompt, *, tokenizer: Any, **options: Any) -> Iterator[str]:
    """Yield the continuation of the only row as text that is final: no half character, no part of a stop string."""
    if len(prompt.ids) * prompt.generation.num_return_sequences != 1 or prompt.generation.num_beams > 1:
        raise InputError("stream: one row and one sequence is written as it comes; use generate for more.")
    text = StoppingStream(tokenizer, prompt.generation.stops, after=prompt.rows[0])
    for step in decode(engine, prompt, tokenizer=tokenizer, **options):
        for token in step.tokens[0]:
            if piece := text.push(token):
                yield piece
    if piece := text.end():
        yield piece


def decode(
    engine: Engine, prompt: Prompt, *, past: Any = None, assistant: Engine | None = None, tokenizer: Any = None
) -> Decode:
    """Yield the new tokens of each step; ends when every row has, and returns the cache: all tokens but the last.

    Only a generated end of sequence ends a row, not one in the prompt.
    """
    generation, rule, rows = prompt.generation, Rule.of(prompt.generation), prompt.rows
    cache, held = begin(engine, prompt, past)
    if generation.max_new_tokens == 0:
        return cache
    deadline = time.monotonic() + (generation.max_time or np.inf)
    seed = engine.random_seed() if generation.seed is None else generation.seed
    key = row_keys(seed, len(rows), generation.num_return_sequences)
    if generation.num_return_sequences > 1:
        cache, held, rows = expanded(engine, cache, held, rows, generation, generation.num_return_sequences)
    ending = _Ending(generation, rows, tokenizer)
    guess = guesses(engine, assistant, prompt, key)
    ended = [False] * len(rows)
    drafts: list[list[int]] = [[] for _ in rows]
    while True:
        columns = 1 + guess.most if any(drafts) else 1
        made = [ending.made(index, row) for index, row in enumerate(rows)]
        bias, seen = limits(generation, engine.config.vocab_size, rows, made, drafts, ended, columns=columns)
        values = Values(numbers(generation), key, np.array(made, np.int32), bias, seen)
        fed = [
            [] if over else [*row[have:], *draft]
            for row, have, draft, over in zip(rows, held, drafts, ended, strict=True)
        ]
        widths = [columns] if columns > 1 else piece_widths(engine, max(map(len, fed)), generation)
        chosen, cache = feed(engine, cache, fed, rule._replace(every=columns > 1), values, widths)
        stop = yield _take(chosen, rows, drafts, ended, ending)
        cache, held = _forget_rest(engine, cache, rows, held, fed)
        if stop or all(ended) or time.monotonic() > deadline:
            return cache
        if generation.on_device_loop:
            return (yield from _on_device(engine, cache, rows, ended, rule, values, ending))
        wanted = [
            0 if over else min(ending.left(index, row) - 1, guess.most)
            for index, (row, over) in enumerate(zip(rows, ended, strict=True))
        ]
        drafts = guess.propose(rows, wanted)


def _take(chosen: Chosen, rows: list[list[int]], drafts: list[list[int]], ended: list[bool], ending: _Ending) -> Step:
    """Each row with its chosen tokens, as long as they are what was guessed; `rows` and `ended` are changed."""
    step = Step([[] for _ in rows], [[] for _ in rows])
    for index, draft in enumerate(drafts):
        for place, guessed in enumerate([] if ended[index] else [*draft, None]):
            token = int(chosen.token[index, place])
            if token < 0:
                raise NonFiniteInputError(_NOTHING.format(index, ending.made(index, rows[index])))
            rows[index].append(token)
            step.tokens[index].append(token)
            step.scores[index] += [] if chosen.scores is None else [chosen.scores[index, place]]
            ended[index] = ending.ends(index, rows[index])
            if ended[index] or token != guessed:
                break
    return step


def _forget_rest(
    engine: Engine, cache: Any, rows: list[list[int]], held: list[int], fed: list[list[int]]
) -> tuple[Any, list[int]]:
    """The cache without the guesses that were not taken, and how many tokens of each row it holds."""
    full = [have + len(new) for have, new in zip(held, fed, strict=True)]
    held = [min(have, len(row) - 1) for have, row in zip(full, rows, strict=True)]
    back = np.array(full) - held
    return cache.rollback(back, engine.config) if back.any() else cache, held


_NOTHING = (
    "row {}, new token {}: the logits hold a NaN or nothing that is finite, so no token can be chosen; look at the "
    "weights, or load them with dtype='float32' if they were float16."
)


class _Ending:
    """What ends a row: its count, an end of sequence, a stop string in its new text."""

    def __init__(self, generation: GenerationConfig, rows: list[list[int]], tokenizer: Any) -> None:
        self.most, self.ids = generation.max_new_tokens, generation.eos_token_ids
        self.prompts = [len(row) for row in rows]
        self.texts: list[StoppingStream] = []
        if generation.stops:
            if tokenizer is None:
                raise GenerationConfigError(
                    "stop_strings: they are looked for in text; give generate tokenizer=... too."
                )
            self.texts = [
                StoppingStream(tokenizer, generation.stops, after=row, skip_special_tokens=False) for row in rows
            ]

    def made(self, index: int, row: list[int]) -> int:
        """How many new tokens a row has."""
        return len(row) - self.prompts[index]

    def left(self, index: int, row: list[int]) -> int:
        """How many more it may have."""
        return self.most - self.made(index, row)

    def ends(self, index: int, row: list[int]) -> bool:
        """Whether the last token of a row ends it; asked once for each."""
        if self.texts:
            self.texts[index].push(row[-1])
        stopped = bool(self.texts) and self.texts[index].stopped
        return stopped or row[-1] in self.ids or self.left(index, row) <= 0


def _on_device(
    engine: Engine, cache: Any, rows: list[list[int]], ended: list[bool], rule: Rule, values: Values, ending: _Ending
) -> Decode:
    """All further steps in the backend's loop, as one."""
    made = np.array([ending.made(index, row) for index, row in enumerate(rows)], np.int32)
    last = np.array([row[-1] for row in rows])
    steps = max(ending.left(index, row) for index, row in enumerate(rows))
    tokens, cache = engine.loop(cache, last, np.array(ended), rule, values._replace(step=made), ending.ids, steps)
    step = Step([[] for _ in rows], [[] for _ in rows])
    for index, row in enumerate(rows):
        for token in map(int, tokens[index]):
            if ended[index]:
                break
            if token < 0:
                raise NonFiniteInputError(_NOTHING.format(index, ending.made(index, row)))
            row.append(token)
            step.tokens[index].append(token)
            ended[index] = ending.ends(index, row)
    yield step
    return cache


def guesses(engine: Engine, assistant: Engine | None, prompt: Prompt, key: Array) -> Guess:
    """Where guesses come from; raises GenerationConfigError for an assistant that cannot give them."""
    generation = prompt.generation
    lookup = generation.prompt_lookup_num_tokens or 0
    if assistant is None:
        longest = generation.max_matching_ngram_size
        return Guess(
            lookup,
            lambda rows, most: [prompt_lookup(row, n, longest) for row, n in zip(rows, most, strict=True)],
        )
    if lookup or generation.on_device_loop:
        raise GenerationConfigError("assistant_model: drop prompt_lookup_num_tokens and on_device_loop.")
    if assistant.config.vocab_size != engine.config.vocab_size:
        raise GenerationConfigError(
            f"assistant_model: vocab_size {assistant.config.vocab_size}, {engine.config.vocab_size} was expected; "
            "it must have been trained with the same tokenizer."
        )
    return Guess(generation.num_assistant_tokens, Assistant(assistant, prompt, key).propose)


def _column(made: list[list[int]], column: int, padding: int) -> Array:
    return np.array([row[column] if column < len(row) else padding for row in made], np.int64)


def _score_columns(scores: list[list[Array]], new: int, size: int, padding: int) -> tuple[Array, ...]:
    """[B, V] for each new column; of an ended row, padding is certain."""
    certain = np.full(size, -np.inf, np.float32)
    certain[padding] = 0
    return tuple(np.stack([row[c] if c < len(row) else certain for row in scores]) for c in range(new))
