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

from . import engine as engines
from .errors import GenerationConfigError, NonFiniteInputError
from .generation import GenerationConfig
from .outputs import GenerateOutput
from .reference.sampling import row_keys
from .sampling import Rule, Values, numbers
from .token_history import limits
from .validate import Array

NEVER = -1e9
"""The score of what is not there."""


class Beam(NamedTuple):
    """New tokens and their score."""

    score: float
    tokens: tuple[int, ...]


class Candidate(NamedTuple):
    """A beam with one token more: where it came from, what it is, its log-probability."""

    beam: int
    token: int
    score: float


def generate(
    engine: engines.Engine, prompt: engines.Prompt, *, past: Any, assistant: Any, streamer: Any
) -> GenerateOutput:
    """The best `num_return_sequences` beams of each row, and their scores; raises GenerationConfigError."""
    generation = prompt.generation
    if streamer is not None or assistant is not None:
        raise GenerationConfigError("num_beams: beams are neither streamed nor guessed; use num_beams=1.")
    running = [[Beam(0.0, ()), *[Beam(NEVER, ())] * (generation.num_beams - 1)] for _ in prompt.rows]
    finished: list[list[Beam]] = [[] for _ in prompt.rows]
    scores: list[Array] = []
    if generation.max_new_tokens:
        _search(engine, prompt, past, running, finished, scores)
    best = [
        beam
        for done, going in zip(finished, running, strict=True)
        for beam in (done + [b for b in going if b.score > NEVER / 2])[: generation.num_return_sequences]
    ]
    new = max(len(beam.tokens) for beam in best)
    tokens = np.full((len(best), new), generation.padding, np.int64)
    for row, beam in enumerate(best):
        tokens[row, : len(beam.tokens)] = beam.tokens
    ids, mask = (np.repeat(x, generation.num_return_sequences, axis=0) for x in (prompt.ids, prompt.mask))
    real = np.arange(new) < np.array([len(beam.tokens) for beam in best])[:, None]
    return GenerateOutput(
        np.concatenate([ids, tokens], axis=1),
        np.concatenate([mask, real.astype(np.int64)], axis=1),
        tuple(scores) if generation.output_scores else None,
        np.array([beam.score for beam in best], np.float32),
    )


def _search(
    engine: engines.Engine, prompt: engines.Prompt, past: Any, running: list[list[Beam]], finished: list[list[Beam]],
    scores: list[Array],
) -> None:  # fmt: skip
    """Extend the running beams of each row and collect the finished ones, best first."""
    generation, size = prompt.generation, engine.config.vocab_size
    beams, ends = generation.num_beams, len(generation.eos_token_ids)
    rule = Rule.of(generation, candidates=min(max(2, 1 + ends) * beams, size))
    deadline = time.monotonic() + (generation.max_time or np.inf)
    cache, held = engines.begin(engine, prompt, past)
    cache, held, prompts = engines.expanded(engine, cache, held, prompt.rows, generation, beams)
    seed = engine.random_seed() if generation.seed is None else generation.seed
    key = row_keys(seed, len(prompt.rows), beams)
    done, without = [False] * len(running), [[] for _ in prompts]  # type: list[bool], list[list[int]]
    for length in range(1, generation.max_new_tokens + 1):
        over = [done[row // beams] for row in range(len(prompts))]
        rows = [[*p, *b.tokens] for p, b in zip(prompts, (b for r in running for b in r), strict=True)]
        made = [length - 1] * len(rows)
        bias, seen = limits(generation, size, rows, made, without, over, columns=1)
        values = Values(numbers(generation), key, np.array(made, np.int32), bias, seen)
        fed = [[] if o else row[-1:] for row, o in zip(rows, over, strict=True)]
        chosen, cache = engines.feed(engine, cache, fed, rule, values, [1])
        scores += [] if chosen.scores is None else [chosen.scores[:, 0]]
        assert chosen.candidates is not None
        origin = np.arange(len(rows))
        for row in (row for row, over in enumerate(done) if not over):
            best = _candidates(running[row], [x[row * beams : (row + 1) * beams, 0] for x in chosen.candidates])
            came = _extend(running, finished, row, best, generation, length)
            origin[row * beams : (row + 1) * beams] = row * beams + np.array(came)
            done[row] = _is_done(running[row], finished[row], generation, length)
        if all(done) or time.monotonic() > deadline:
            return
        if (origin != np.arange(len(rows))).any():
            cache = cache.select_rows(origin)


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


def _extend(
    running: list[list[Beam]], finished: list[list[Beam]], row: int, best: list[Candidate],
    generation: GenerationConfig, length: int,
) -> list[int]:  # fmt: skip
    """A row's next running beams, in place, and those that finished; returns which beam each one continues."""
    old, ends = running[row], generation.eos_token_ids
    ended = [
        Beam(c.score / length**generation.length_penalty, (*old[c.beam].tokens, c.token))
        for c in best[: generation.num_beams]
        if (c.token in ends or length == generation.max_new_tokens) and c.score > NEVER / 2
    ]
    finished[row] = sorted(finished[row] + ended, key=lambda beam: -beam.score)[: generation.num_beams]
    going = sorted((c for c in best if c.token not in ends), key=lambda c: -c.score)[: generation.num_beams]
    running[row] = [Beam(c.score, (*old[c.beam].tokens, c.token)) for c in going]
    return [c.beam for c in going]


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
