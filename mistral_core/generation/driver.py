"""The one decode driver: prefill, step, stopping, speculation and streaming over a backend's engine.

A token depends on the text before it and on its own noise, not on how it was computed: chunks, padding, batch and
guesses change the speed only. Every row holds its real tokens; what is padding in a prompt is left out before anything
is computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import GenerationConfigError, InputError, NonFiniteInputError
from ..outputs import GenerateOutput
from ..reference.sampling import log_softmax, row_keys
from ..text.stream import StoppingStream, telling
from . import beams
from .ending import Ending, column, score_columns
from .engine import Chosen, Engine, Prompt, begin, feed, piece_widths, repeat_rows
from .guesses import Assistant, prompt_lookup
from .history import limits
from .hooks import Chooser, Hooks
from .preparing import prepare
from .sampling import Rule, Values, numbers

__all__ = ["Chosen", "Engine", "Prompt", "decode", "generate", "prepare", "result", "stream", "transition_scores"]


class Step(NamedTuple):
    """The new tokens of each row, none where it has ended; the scores [V] they were chosen from and the logits [V].

    Both are there where they are asked for.
    """

    tokens: list[list[int]]
    scores: list[list[Array]]
    logits: list[list[Array]]


Decode = Generator[Step, bool | None, Any]
"""Steps, and at their end the cache; what is sent back after a step says whether it was the last."""


class Guess(NamedTuple):
    """Where guesses of the next tokens come from."""

    most: int
    """The most of them for a row and step; 0: none are made."""
    propose: Callable[[list[list[int]], list[int]], list[list[int]]]
    """Rows and how many are wanted for each -> guesses of what comes next."""


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
    beginning is used. `streamer` is told the prompt and each column of new tokens, and may return True to end all rows;
    of beams it is told the best of each row at the end.
    """
    generation = prompt.generation
    with telling(streamer):
        if generation.num_beams > 1:
            return beams.generate(
                engine, prompt, past=past, assistant=assistant, streamer=streamer, tokenizer=tokenizer
            )
        if streamer is not None:
            streamer.put(np.repeat(prompt.ids, generation.num_return_sequences, axis=0))
        running = decode(engine, prompt, past=past, assistant=assistant, tokenizer=tokenizer)
        made, cache = _collected(running, prompt, streamer)
    new = max(map(len, made.tokens))
    new_mask = np.arange(new) < np.array([len(row) for row in made.tokens])[:, None]
    columns = [column(made.tokens, place, generation.padding) for place in range(new)]
    size, padding, copies = engine.config.vocab_size, generation.padding, generation.num_return_sequences
    out = GenerateOutput(
        sequences=np.column_stack([np.repeat(prompt.ids, copies, axis=0), *columns]),
        scores=score_columns(made.scores, new, size, padding) if generation.output_scores else None,
        logits=score_columns(made.logits, new, size, padding) if generation.output_logits else None,
        past_key_values=cache,
        attention_mask=np.column_stack([np.repeat(prompt.mask, copies, axis=0), new_mask.astype(np.int64)]),
    )
    return looked_into(engine, prompt, out) if new else out


def _collected(running: Decode, prompt: Prompt, streamer: Any) -> tuple[Step, Any]:
    """All steps as one, and the cache; the streamer is told each column as soon as every row has it."""
    rows, put = len(prompt.ids) * prompt.generation.num_return_sequences, 0
    made = _no_step(rows)
    stop: bool | None = None

    def tell(until: int) -> None:
        nonlocal put, stop
        while streamer is not None and put < until:
            stop = streamer.put(column(made.tokens, put, prompt.generation.padding)) or stop
            put += 1

    with contextlib.closing(running):
        while True:
            try:
                step = running.send(stop)
            except StopIteration as end:
                tell(max(map(len, made.tokens)))
                return made, end.value
            for row in range(rows):
                made.tokens[row].extend(step.tokens[row])
                made.scores[row].extend(step.scores[row])
                made.logits[row].extend(step.logits[row])
            tell(min([len(row) for row, new in zip(made.tokens, step.tokens, strict=True) if new], default=0))


def looked_into(engine: Engine, prompt: Prompt, out: GenerateOutput) -> GenerateOutput:
    """With hidden states and attention weights, where they are asked for: computed once more, without a cache."""
    generation = prompt.generation
    if not (generation.output_hidden_states or generation.output_attentions):
        return out
    copies, first = generation.num_return_sequences, prompt.columns
    ids, mask, embeds = out.sequences[:, :-1], np.asarray(out.attention_mask)[:, :-1], None
    if prompt.embeds is not None:
        ids, mask = ids[:, prompt.ids.shape[1] :], mask[:, prompt.ids.shape[1] :]
        mask = np.column_stack([np.repeat(prompt.embeds_mask, copies, axis=0), mask])  # type: ignore[arg-type]
        embeds = np.repeat(prompt.embeds, copies, axis=0)
    states, weights = engine.look(ids, mask, embeds)
    steps = [slice(0, first), *(slice(t, t + 1) for t in range(first, mask.shape[1]))]
    return out._replace(
        hidden_states=tuple(tuple(x[:, step] for x in states) for step in steps)
        if generation.output_hidden_states
        else None,
        attentions=tuple(tuple(x[:, :, step, : step.stop] for x in weights) for step in steps)
        if generation.output_attentions
        else None,
    )


def result(engine: Engine, prompt: Prompt, out: GenerateOutput) -> Any:
    """What a backend's `generate` returns: the framework's arrays, the sequences alone unless all was asked for."""
    if not prompt.generation.return_dict_in_generate:
        return engine.array(out.sequences)
    ours = {
        name: tuple(map(engine.array, value)) if isinstance(value, tuple) else engine.array(value)
        for name, value in out._asdict().items()
        if value is not None and name not in ("attentions", "hidden_states", "past_key_values")
    }
    return out._replace(**ours)


def transition_scores(
    sequences: Array, scores: list[Array], beam_indices: Array | None, *, normalize_logits: bool
) -> Array:
    """The score [B, new] of each new token that was chosen, 0 after the end of a beam; raises InputError."""
    score_NRV = np.stack(scores).astype(np.float32)
    if normalize_logits:
        score_NRV = log_softmax(score_NRV)
    new = len(score_NRV)
    if beam_indices is None:
        beam_indices = np.repeat(np.arange(score_NRV.shape[1])[:, None], new, axis=1)
    rows_BN = np.asarray(beam_indices)[:, :new]
    rows_BN = rows_BN[:, : max((rows_BN >= 0).sum(axis=1), default=0)]
    if len(rows_BN) != len(sequences) or rows_BN.shape[1] > sequences.shape[1]:
        raise InputError(
            f"compute_transition_scores: sequences must be {len(rows_BN)} rows with the new tokens of the scores at "
            f"their end, got the shape {sequences.shape}; of beams give beam_indices."
        )
    tokens_BN = sequences[:, sequences.shape[1] - rows_BN.shape[1] :]
    found = score_NRV[np.arange(rows_BN.shape[1]), np.maximum(rows_BN, 0), tokens_BN]
    return np.where(rows_BN < 0, np.float32(0), found)


def stream(engine: Engine, prompt: Prompt, *, tokenizer: Any, **options: Any) -> Iterator[str]:
    """The continuation of the only row as text that is final: no half character, no part of a stop string.

    Of beams the best is written at the end. Raises InputError for several rows.
    """
    generation = prompt.generation
    if len(prompt.ids) * generation.num_return_sequences != 1:
        raise InputError("stream: one row and one sequence is written as it comes; use generate for more.")
    return _streamed(engine, prompt, tokenizer, options)


def _streamed(engine: Engine, prompt: Prompt, tokenizer: Any, options: dict[str, Any]) -> Iterator[str]:
    text = StoppingStream(tokenizer, prompt.generation.stops, after=prompt.rows[0])
    for tokens in _token_steps(engine, prompt, tokenizer, options):
        for token in tokens:
            if piece := text.push(token):
                yield piece
    if piece := text.end():
        yield piece


def _token_steps(engine: Engine, prompt: Prompt, tokenizer: Any, options: dict[str, Any]) -> Iterator[list[int]]:
    if prompt.generation.num_beams > 1:
        out = generate(engine, prompt, tokenizer=tokenizer, **options)
        real = np.asarray(out.attention_mask)[0, prompt.ids.shape[1] :] != 0
        yield out.sequences[0, prompt.ids.shape[1] :][real].tolist()
    else:
        with contextlib.closing(decode(engine, prompt, tokenizer=tokenizer, **options)) as steps:
            for step in steps:
                yield step.tokens[0]


def decode(
    engine: Engine, prompt: Prompt, *, past: Any = None, assistant: Engine | None = None, tokenizer: Any = None
) -> Decode:
    """Yield the new tokens of each step; ends when every row has, and returns the cache: all tokens but the last.

    Only a generated end of sequence ends a row, not one in the prompt.
    """
    generation, hooks, copies = prompt.generation, prompt.hooks, prompt.generation.num_return_sequences
    rule = Rule.of(generation)
    chooser = Chooser(engine, generation, hooks, rule)
    rows = [list(row) for row in prompt.rows for _ in range(copies)]
    guess = guesses(engine, assistant, prompt)
    cache, fed = begin(engine, prompt, past)
    if generation.max_new_tokens == 0:
        return cache
    deadline = time.monotonic() + (generation.max_time or np.inf)
    seed = engine.random_seed() if generation.seed is None else generation.seed
    key = row_keys(seed, len(prompt.rows), copies)
    if copies > 1:
        cache, fed = repeat_rows(engine, cache, fed, generation, copies)
    ending = Ending(engine, prompt, rows, tokenizer)
    ended = [False] * len(rows)
    drafts: list[list[int]] = [[] for _ in rows]
    propose = guess(key)
    while True:
        columns = 1 + propose.most if any(drafts) else 1
        made = [ending.made(index, row) for index, row in enumerate(rows)]
        bias, seen = limits(generation, engine.config.vocab_size, rows, made, drafts, ended, columns=columns)
        values = Values(numbers(generation), key, np.array(made, np.int32), bias, seen)
        widths = [columns] if columns > 1 else piece_widths(engine, max(map(len, fed)), generation)
        chosen, cache = feed(engine, cache, fed, chooser.asked(every=columns > 1), values, widths)
        if chooser.is_here:
            assert chosen.logits is not None
            choice = chooser(chosen.logits, values, ending.ids_so_far(rows) if hooks.shape else prompt.ids)
            chosen = chosen._replace(token=choice.token, scores=choice.scores)
        if not generation.output_logits:
            chosen = chosen._replace(logits=None)
        step = _take(chosen, rows, drafts, ended, ending)
        ending.ask(rows, ended, step.scores)
        try:
            stop = yield step
        except BaseException:  # the caller has enough, or a function of theirs failed
            engine.stops(True)
            raise
        cache = _forget_rest(engine, cache, drafts, step)
        if engine.stops(bool(stop) or all(ended) or time.monotonic() > deadline):
            return cache
        if generation.on_device_loop:
            return (yield from _on_device(engine, cache, rows, ended, rule, values, ending))
        wanted = [
            0 if over else min(ending.left(index, row) - 1, propose.most)
            for index, (row, over) in enumerate(zip(rows, ended, strict=True))
        ]
        drafts = propose.propose(rows, wanted)
        fed = [[] if over else [row[-1], *draft] for row, draft, over in zip(rows, drafts, ended, strict=True)]


def _take(chosen: Chosen, rows: list[list[int]], drafts: list[list[int]], ended: list[bool], ending: Ending) -> Step:
    """Each row with its chosen tokens, as long as they are what was guessed; `rows` and `ended` are changed."""
    step = _no_step(len(rows))
    for index, draft in enumerate(drafts):
        for place, guessed in enumerate([] if ended[index] else [*draft, None]):
            token = int(chosen.token[index, place])
            if token < 0:
                raise NonFiniteInputError(_NOTHING.format(index, ending.made(index, rows[index])))
            rows[index].append(token)
            step.tokens[index].append(token)
            step.scores[index] += [] if chosen.scores is None else [chosen.scores[index, place]]
            step.logits[index] += [] if chosen.logits is None else [chosen.logits[index, place]]
            ended[index] = ending.ends(index, rows[index])
            if ended[index] or token != guessed:
                break
    return step


def _no_step(rows: int) -> Step:
    return Step([[] for _ in range(rows)], [[] for _ in range(rows)], [[] for _ in range(rows)])


def _forget_rest(engine: Engine, cache: Any, drafts: list[list[int]], step: Step) -> Any:
    """The cache without the guesses that were not taken."""
    back = [len(draft) + 1 - len(new) if new else 0 for draft, new in zip(drafts, step.tokens, strict=True)]
    return cache.rollback(np.array(back), engine.config) if any(back) else cache


_NOTHING = (
    "row {}, new token {}: the logits hold a NaN or nothing that is finite, so no token can be chosen; look at the "
    "weights, or load them with dtype='float32' if they were float16, or at what a logits_processor forbids."
)


def _on_device(
    engine: Engine, cache: Any, rows: list[list[int]], ended: list[bool], rule: Rule, values: Values, ending: Ending
) -> Decode:
    """All further steps in the backend's loop, as one."""
    made = np.array([ending.made(index, row) for index, row in enumerate(rows)], np.int32)
    last = np.array([row[-1] for row in rows])
    steps = max(ending.left(index, row) for index, row in enumerate(rows))
    tokens, cache = engine.loop(cache, last, np.array(ended), rule, values._replace(step=made), ending.ids, steps)
    step = _no_step(len(rows))
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


def guesses(engine: Engine, assistant: Engine | None, prompt: Prompt) -> Callable[[Array], Guess]:
    """The noise's key -> where guesses come from; raises GenerationConfigError for an assistant that cannot guess.

    None are made where the caller's functions are asked at every step.
    """
    generation = prompt.generation
    lookup = generation.prompt_lookup_num_tokens or 0
    if assistant is not None:
        _check_assistant(engine, assistant, prompt)
    if prompt.hooks != Hooks():
        if generation.on_device_loop:
            raise GenerationConfigError(
                "on_device_loop: it takes neither logits_processor, stopping_criteria nor prefix_allowed_tokens_fn."
            )
        return lambda key: Guess(0, lambda rows, most: [[] for _ in rows])
    if assistant is not None:
        return lambda key: Guess(generation.num_assistant_tokens, Assistant(assistant, prompt, key).propose)
    longest = generation.max_matching_ngram_size
    return lambda key: Guess(
        lookup, lambda rows, most: [prompt_lookup(row, n, longest) for row, n in zip(rows, most, strict=True)]
    )


def _check_assistant(engine: Engine, assistant: Engine, prompt: Prompt) -> None:
    if prompt.generation.prompt_lookup_num_tokens or prompt.generation.on_device_loop:
        raise GenerationConfigError("assistant_model: drop prompt_lookup_num_tokens and on_device_loop.")
    if prompt.embeds is not None:
        raise GenerationConfigError("assistant_model: it reads ids; give input_ids instead of inputs_embeds.")
    if assistant.config.vocab_size != engine.config.vocab_size:
        raise GenerationConfigError(
            f"assistant_model: vocab_size must be {engine.config.vocab_size}, got {assistant.config.vocab_size}; "
            "it must have been trained with the same tokenizer."
        )
