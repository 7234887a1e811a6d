"""Beam search over a backend's engine: the num_beams likeliest continuations, kept side by side.

The rules are transformers' own: of 2 (with e ends of sequence: 1 + e) x num_beams candidates, those that end become
finished if they are among the num_beams best, with a score of log-probability / length ** length_penalty; a row is done
when no running beam can beat its worst finished one (`early_stopping=False` judges by today's length, "never" by the
longest), or with `early_stopping=True` as soon as num_beams have finished. With `do_sample` the candidates are drawn
without replacement (Gumbel top-k, arXiv 1903.06059).
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import GenerationConfigError, NonFiniteInputError
from ..outputs import GenerateOutput
from ..reference.sampling import row_keys
from ..text.stream import StoppingStream
from . import engine as engines
from .ending import stop_streams
from .history import limits
from .hooks import Chooser
from .options import GenerationConfig
from .sampling import Rule, Values, numbers

NEVER = -1e9
"""The score of what is not there."""


class Beam(NamedTuple):
    """New tokens and their score."""

    score: float
    tokens: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    """For each token, the row of the scores it was chosen from."""
    text: StoppingStream | None = None
    """What looks for stop strings in it."""


class Candidate(NamedTuple):
    """A beam with one token more: which it continues, its log-probability, whether it ends."""

    beam: int
    token: int
    score: float
    text: StoppingStream | None = None
    ends: bool = False


def generate(
    engine: engines.Engine, prompt: engines.Prompt, *, past: Any, assistant: Any, streamer: Any, tokenizer: Any
) -> GenerateOutput:
    """The best `num_return_sequences` beams of each row, and their scores; raises GenerationConfigError.

    A streamer is told the best of each row at the end.
    """
    generation = prompt.generation
    if assistant is not None:
        raise GenerationConfigError("num_beams: beams are not guessed by an assistant_model; use num_beams=1.")
    if streamer is not None:
        streamer.put(prompt.ids)
    search = _Search(engine, prompt, tokenizer)
    if generation.max_new_tokens:
        search.run(past)
    copies, ids = generation.num_return_sequences, prompt.ids
    best = search.best(copies)
    new = max(len(beam.tokens) for beam in best)
    tokens = _padded([beam.tokens for beam in best], new, generation.padding)
    for column in range(new if streamer is not None else 0):
        streamer.put(tokens[::copies, column])
    real = np.arange(new) < np.array([len(beam.tokens) for beam in best])[:, None]
    return GenerateOutput(
        sequences=np.concatenate([np.repeat(ids, copies, axis=0), tokens], axis=1),
        sequences_scores=np.array([beam.score for beam in best], np.float32),
        scores=tuple(search.scores) if generation.output_scores else None,
        logits=tuple(search.logits) if generation.output_logits else None,
        beam_indices=_padded([beam.rows for beam in best], new, -1),
        attentions=tuple(search.attentions) if generation.output_attentions else None,
        hidden_states=tuple(search.hidden_states) if generation.output_hidden_states else None,
        attention_mask=np.concatenate([np.repeat(prompt.mask, copies, axis=0), real.astype(np.int64)], axis=1),
    )


def _padded(rows: list[tuple[int, ...]], columns: int, padding: int) -> Array:
    array = np.full((len(rows), columns), padding, np.int64)
    for row, values in enumerate(rows):
        array[row, : len(values)] = values
    return array


class _Search:
    """The beams of all rows, running and finished, and what was asked for of each step."""

    def __init__(self, engine: engines.Engine, prompt: engines.Prompt, tokenizer: Any) -> None:
        self.engine, self.prompt, self.generation = engine, prompt, prompt.generation
        texts: list[Any] = [*stop_streams(tokenizer, self.generation.stops, prompt.rows)] or [None] * len(prompt.rows)
        self.count = self.generation.num_beams
        others = [Beam(NEVER)] * (self.count - 1)
        self.running = [[Beam(0.0, text=text), *others] for text in texts]
        self.finished: list[list[Beam]] = [[] for _ in prompt.rows]
        self.scores: list[Array] = []
        self.logits: list[Array] = []
        self.attentions: list[Any] = []
        self.hidden_states: list[Any] = []
        self.told: list[Any] = []

    def best(self, copies: int) -> list[Beam]:
        """So many beams of each row, the finished ones first; the best again where there are not so many."""
        best = []
        for done, going in zip(self.finished, self.running, strict=True):
            there = done + [beam for beam in going if beam.score > NEVER / 2]
            best += [there[min(copy, len(there) - 1)] for copy in range(copies)]
        return best

    def run(self, past: Any) -> None:
        """Extend the running beams of each row and collect the finished ones, best first."""
        engine, prompt, generation, beams = self.engine, self.prompt, self.generation, self.count
        size, ends = engine.config.vocab_size, len(generation.eos_token_ids)
        rule = Rule.of(generation, candidates=min(max(2, 1 + ends) * beams, size))
        chooser = Chooser(engine, generation, prompt.hooks, rule)
        deadline = time.monotonic() + (generation.max_time or np.inf)
        seed = engine.random_seed() if generation.seed is None else generation.seed
        key = row_keys(seed, len(prompt.rows), beams)
        cache, fed = engines.begin(engine, prompt, past)
        cache, fed = engines.repeat_rows(engine, cache, fed, generation, beams)
        prompts = [row for row in prompt.rows for _ in range(beams)]
        done, without = [False] * len(self.running), [[] for _ in prompts]  # type: list[bool], list[list[int]]
        for length in range(1, generation.max_new_tokens + 1):
            over = [done[row // beams] for row in range(len(prompts))]
            rows = [[*p, *b.tokens] for p, b in zip(prompts, (b for r in self.running for b in r), strict=True)]
            made = [length - 1] * len(rows)
            bias, seen = limits(generation, size, rows, made, without, over, columns=1)
            values = Values(numbers(generation), key, np.array(made, np.int32), bias, seen)
            fed = [[] if o else row for row, o in zip(fed, over, strict=True)] if any(over) else fed
            chosen, cache = engines.feed(engine, cache, fed, chooser.asked(), values, [1])
            if chooser.is_here:
                assert chosen.logits is not None
                choice = chooser(chosen.logits, values, self._ids_so_far(length - 1))
                chosen = chosen._replace(scores=choice.scores, candidates=choice.candidates)
            self._remember(chosen, length - 1)
            assert chosen.candidates is not None
            origin = np.arange(len(rows))
            found = [
                []
                if over
                else _candidates(self.running[row], [x[row * beams : (row + 1) * beams, 0] for x in chosen.candidates])
                for row, over in enumerate(done)
            ]
            found = self._asked(found, length)
            for row in (row for row, over in enumerate(done) if not over):
                came = self._extend(row, found[row], length)
                origin[row * beams : (row + 1) * beams] = row * beams + np.array(came)
                done[row] = _is_done(self.running[row], self.finished[row], generation, length)
            if engine.stops(all(done) or time.monotonic() > deadline):
                return
            if (origin != np.arange(len(rows))).any():
                cache = cache.select_rows(origin)
            fed = [[b.tokens[-1]] for r in self.running for b in r]

    def _remember(self, chosen: engines.Chosen, made: int) -> None:
        """What was asked for of a step: scores, logits, and, computed once more, what is inside."""
        generation = self.generation
        if generation.output_scores and chosen.scores is not None:
            self.scores.append(chosen.scores[:, 0].astype(np.float32))
        if generation.output_logits and chosen.logits is not None:
            self.logits.append(chosen.logits[:, 0].astype(np.float32))
        if not (generation.output_attentions or generation.output_hidden_states):
            return
        ids, prompt = self._ids_so_far(made), self.prompt
        new, mask = ids[:, prompt.ids.shape[1] :], np.repeat(prompt.mask, self.count, axis=0)
        embeds = None
        if prompt.embeds is not None and prompt.embeds_mask is not None:
            ids, embeds = new, np.repeat(prompt.embeds, self.count, axis=0)
            mask = np.repeat(prompt.embeds_mask, self.count, axis=0)
        states, weights = self.engine.look(ids, np.column_stack([mask, np.ones_like(new)]), embeds)
        last = slice(-1, None) if made else slice(None)
        self.hidden_states.append(tuple(x[:, last] for x in states))
        self.attentions.append(tuple(x[:, :, last] for x in weights))

    def _ids_so_far(self, made: int) -> Array:
        """[B * beams, T + made]: what each running beam continues, padded where a row is done."""
        beams = [beam.tokens[:made] for row in self.running for beam in row]
        return np.column_stack(
            [np.repeat(self.prompt.ids, self.count, axis=0), _padded(beams, made, self.generation.padding)]
        )

    def _asked(self, found: list[list[Candidate]], length: int) -> list[list[Candidate]]:
        """The candidates with what ends them: an end of sequence, the length, a stop string, a caller's function."""
        generation, hooks = self.generation, self.prompt.hooks
        made = [[self._ended(c, self.running[row][c.beam], length) for c in all] for row, all in enumerate(found)]
        if not hooks.criteria:
            return made
        each = [(row, c) for row, all in enumerate(made) for c in all]
        tokens = [(*self.running[row][c.beam].tokens, c.token) for row, c in each]
        ids = np.column_stack([self.prompt.ids[[row for row, _ in each]], _padded(tokens, length, generation.padding)])
        if generation.output_scores:
            self.told.append(self.engine.array(self.scores[-1]))
        stopped = iter(hooks.stopped(self.engine, ids, tuple(self.told) if generation.output_scores else None))
        return [[c._replace(ends=bool(next(stopped)) or c.ends) for c in all] for all in made]

    def _ended(self, candidate: Candidate, beam: Beam, length: int) -> Candidate:
        text = beam.text
        if text is not None:
            text = text.copy()
            text.push(candidate.token)
        ends = candidate.token in self.generation.eos_token_ids or length == self.generation.max_new_tokens
        return candidate._replace(text=text, ends=ends or (text is not None and text.stopped))

    def _extend(self, row: int, best: list[Candidate], length: int) -> list[int]:
        """A row's next running beams and those that finished; returns which beam each one continues."""
        old, generation = self.running[row], self.generation

        def longer(c: Candidate, score: float) -> Beam:
            beam = old[c.beam]
            return Beam(score, (*beam.tokens, c.token), (*beam.rows, row * self.count + c.beam), c.text)

        ended = [
            longer(c, c.score / length**generation.length_penalty)
            for c in best[: self.count]
            if c.ends and c.score > NEVER / 2
        ]
        self.finished[row] = sorted(self.finished[row] + ended, key=lambda beam: -beam.score)[: self.count]
        going = sorted(best, key=lambda c: -c.score - NEVER * c.ends)[: self.count]
        self.running[row] = [longer(c, c.score + NEVER * c.ends) for c in going]
        return [c.beam for c in going]


def _candidates(beams: list[Beam], found: list[Array]) -> list[Candidate]:
    """The best of what each beam of a row offers, by score and noise."""
    noisy, score, token = found
    if np.isnan(noisy).any() or not np.isfinite(noisy.max()):
        raise NonFiniteInputError("the logits hold a NaN or nothing that is finite, so no token can be chosen.")
    before = np.array([beam.score for beam in beams])[:, None]
    order = np.argsort(-(before + noisy), axis=None, kind="stable")[: noisy.shape[1]]
    total = before + score
    width = noisy.shape[1]
    return [Candidate(int(i) // width, int(token.flat[i]), float(total.flat[i])) for i in order]


def _is_done(running: list[Beam], finished: list[Beam], generation: GenerationConfig, length: int) -> bool:
    """Whether a row can have no better beams than it has."""
    if length == generation.max_new_tokens:
        return True
    if len(finished) < generation.num_beams:
        return False
    never = generation.early_stopping == "never" and generation.length_penalty > 0
    reachable = generation.max_new_tokens if never else length
    best = running[0].score / reachable**generation.length_penalty
    return generation.early_stopping is True or best <= finished[-1].score
