"""The one decode driver: prefill, step, stopping, speculation and streaming over a backend's engine.

A token depends on the text before it and on its own noise, not on how it was computed: chunks, padding, batch and
guesses change the speed only. Every row holds its real tokens; what is padding in a prompt is left out before anything
is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import validate
from .cache_layout import grown_layout
from .config import MistralConfig
from .errors import GenerationConfigError, InputError, NonFiniteInputError
from .generation import GenerationConfig, check_prompt
from .outputs import GenerateOutput
from .reference.sampling import row_keys
from .sampling import Rule, Values, numbers
from .text.stream import StoppingStream
from .token_history import limits
from .validate import Array

LOG = logging.getLogger("mistral.decoding")
CHUNK = 512
"""Columns of a prompt that are computed at once where nothing else is asked for."""
CAPACITY = 512
"""The smallest cache of an engine that compiles for each shape; larger ones are powers of two."""
LOOKBACK = 64
"""Tokens that a rolling cache can go back, for a turn that takes some of the last one back, and for guesses."""


class Chosen(NamedTuple):
    """What an engine's step gives: `mistral_core.reference.sampling.Choice`, on the host."""

    token: Array
    """[B, T] or, where the rule asks for the last column only, [B, 1]."""
    scores: Array | None = None
    candidates: tuple[Array, Array, Array] | None = None


class Engine(Protocol):
    """A model's step, compiled or not, with NumPy at its border; the cache is the backend's own."""

    config: MistralConfig
    fixed_prompts: bool
    """Whether each number of columns costs a compilation: then prompts are padded to few."""
    fixed_caches: bool
    """Whether each size of the cache costs one: then it comes in few."""

    def allocate(self, batch: int, capacity: int, *, rolling: bool, lookback: int) -> Any:
        """An empty cache."""

    def step(self, cache: Any, ids_BT: Array, mask_BT: Array, rule: Rule, values: Values) -> tuple[Chosen, Any]:
        """The tokens chosen after the last column, or each, and the cache with the new ones in it."""

    def loop(
        self, cache: Any, token_B: Array, ended_B: Array, rule: Rule, values: Values, ends: tuple[int, ...],
        steps: int,
    ) -> tuple[Array, Any]:  # fmt: skip
        """The tokens [B, steps] of so many steps in one compiled loop, which ends early when every row has."""

    def random_seed(self) -> int:
        """A seed from the framework's own generator, where it has one."""


class Prompt(NamedTuple):
    """What is to be continued: checked ids, mask and options."""

    ids: Array
    """[B, T] int64."""
    mask: Array
    generation: GenerationConfig

    @property
    def rows(self) -> list[list[int]]:
        """The real tokens of each row."""
        return [row[real != 0].tolist() for row, real in zip(self.ids, self.mask, strict=True)]


class Step(NamedTuple):
    """The new tokens of each row, none where it has ended, and the scores [V] they were chosen from, if asked for."""

    tokens: list[list[int]]
    scores: list[list[Array]]


Decode = Generator[Step, None, Any]
"""Steps, and at their end the cache."""


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
    beginning is used. `streamer` is told the prompt and each column of new tokens.
    """
    generation = prompt.generation
    if generation.num_beams > 1:
        from . import beam_search  # which calls this module

        return beam_search.generate(engine, prompt, past=past, assistant=assistant, streamer=streamer)
    copies = generation.num_return_sequences
    made: list[list[int]] = [[] for _ in range(len(prompt.ids) * copies)]
    scores: list[list[Array]] = [[] for _ in made]
    put = 0
    if streamer is not None:
        streamer.put(prompt.ids)
    try:
        running = decode(engine, prompt, past=past, assistant=assistant, tokenizer=tokenizer)
        while True:
            try:
                step = next(running)
            except StopIteration as stop:
                cache = stop.value
                break
            for row, (tokens, distributions) in enumerate(zip(*step, strict=True)):
                made[row] += tokens
                scores[row] += distributions
            going = [len(row) for row, tokens in zip(made, step.tokens, strict=True) if tokens]
            while streamer is not None and put < min(going, default=0):
                streamer.put(_column(made, put, generation.padding))
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
        yield _take(chosen, rows, drafts, ended, ending)
        cache, held = _forget_rest(engine, cache, rows, held, fed)
        if all(ended) or time.monotonic() > deadline:
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


def begin(engine: Engine, prompt: Prompt, past: Any) -> tuple[Any, list[int]]:
    """A cache with room for all that is to come, and how many tokens of each row it holds: fewer than the row has."""
    generation, rows = prompt.generation, prompt.rows
    capacity = max(map(len, rows)) + generation.max_new_tokens
    rolling, lookback = generation.cache != "full", max(LOOKBACK, generation.prompt_lookup_num_tokens or 0,
                                                        generation.num_assistant_tokens)  # fmt: skip
    if engine.fixed_caches:
        capacity = min(max(CAPACITY, 1 << (capacity - 1).bit_length()), engine.config.max_position_embeddings)
    if past is not None:
        cache = past.past_key_values if isinstance(past, GenerateOutput) else past
        length = _lengths(cache)
        if len(length) != len(rows):
            raise InputError(f"past_key_values: {len(length)} rows, input_ids has {len(rows)}.")
        common = [min(len(row) - 1, have) for row, have in zip(rows, length, strict=True)]
        if isinstance(past, GenerateOutput):
            common = [min(c, alike(row, old)) for c, row, old in zip(common, rows, _rows(past), strict=True)]
        back = np.array(length) - common
        capacity = max(capacity, cache.capacity or 0)
        slots = grown_layout(
            engine.config,
            [k.shape[1] for k in cache.keys],
            cache.capacity,
            capacity,
            rolling=rolling,
            lookback=lookback,
        )
        try:
            # in the order of safety: a cache that rolled too far to go back is not grown first
            return cache.rollback(back, engine.config).grown(slots, capacity), common
        except InputError:
            if not isinstance(past, GenerateOutput):
                raise
    return engine.allocate(len(rows), capacity, rolling=rolling, lookback=lookback), [0] * len(rows)


def expanded(
    engine: Engine, cache: Any, held: list[int], rows: list[list[int]], generation: GenerationConfig, copies: int
) -> tuple[Any, list[int], list[list[int]]]:
    """Cache, counts and rows with each row so many times; the prompt, but for its last token, is computed once."""
    rest = [row[have:-1] for row, have in zip(rows, held, strict=True)]
    if any(rest):
        nothing = Values(numbers(generation), np.zeros((len(rows), 2), np.uint32), np.zeros(len(rows), np.int32))
        _, cache = feed(engine, cache, rest, Rule(), nothing, piece_widths(engine, max(map(len, rest)), generation))
    times = np.repeat(np.arange(len(rows)), copies)
    return cache.select_rows(times), [len(rows[row]) - 1 for row in times], [list(rows[row]) for row in times]


def feed(
    engine: Engine, cache: Any, fed: list[list[int]], rule: Rule, values: Values, widths: list[int]
) -> tuple[Chosen, Any]:
    """Each row's next tokens into the cache, in pieces so wide; what is chosen after the last one, or after each.

    Rows are padded in front, so that all of them end with the last piece; behind, where something is chosen after each.
    """
    ids_BT = np.zeros((len(fed), sum(widths)), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, tokens in enumerate(fed):
        where = slice(len(tokens)) if rule.every else slice(sum(widths) - len(tokens), None)
        ids_BT[row, where], mask_BT[row, where] = tokens, 1
    start = 0
    for width in widths:
        part = slice(start, start + width)
        chosen, cache = engine.step(cache, ids_BT[:, part], mask_BT[:, part], rule, values)
        start += width
        if len(widths) > 1:
            LOG.info("prompt: %d of %d columns", start, sum(widths))
    return chosen, cache


def piece_widths(engine: Engine, columns: int, generation: GenerationConfig) -> list[int]:
    """How a prompt of so many columns is cut."""
    chunk = generation.prefill_chunk_size or CHUNK
    if engine.fixed_prompts:
        return pieces(columns, chunk)
    first = columns % chunk
    return [first] * bool(first) + [chunk] * (columns // chunk)


def pieces(columns: int, chunk: int) -> list[int]:
    """Widths of few kinds that add up to the columns or a little more, the first one padded: (chunk / 16, / 4, / 1).

    What is left is padded to the next kind where that is less than double.
    """
    if columns == 1:
        return [1]
    kinds = sorted({max(chunk // 16, 1), max(chunk // 4, 1), chunk})
    widths: list[int] = []
    while columns > 0:
        above = next((kind for kind in kinds if kind >= columns), None)
        below = max((kind for kind in kinds if kind <= columns), default=None)
        width = above if above is not None and (below is None or 2 * columns > above) else below
        assert width is not None
        widths.append(width)
        columns -= width
    return widths[::-1]


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
    from .speculation import Assistant, prompt_lookup  # which call this module

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


def _lengths(cache: Any) -> list[int]:
    return [int(length) for length in cache.length]


def _rows(past: GenerateOutput) -> list[list[int]]:
    """The real tokens of each row of an earlier call."""
    pairs = zip(past.sequences, past.attention_mask, strict=True)
    return [[int(token) for token, real in zip(row, mask, strict=True) if real] for row, mask in pairs]


def alike(row: list[int], old: list[int]) -> int:
    """How many tokens two rows have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(row, old, strict=False)) if a != b), min(len(row), len(old)))


def _column(made: list[list[int]], column: int, padding: int) -> Array:
    return np.array([row[column] if column < len(row) else padding for row in made], np.int64)


def _score_columns(scores: list[list[Array]], new: int, size: int, padding: int) -> tuple[Array, ...]:
    """[B, V] for each new column; of an ended row, padding is certain."""
    certain = np.full(size, -np.inf, np.float32)
    certain[padding] = 0
    return tuple(np.stack([row[c] if c < len(row) else certain for row in scores]) for c in range(new))
