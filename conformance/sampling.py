"""Choosing tokens, compared: the noise, what each filter leaves, the choice, and whole sampled texts."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mistral_core.arrays import Array
from mistral_core.config.presets import TINY
from mistral_core.generation import GenerationConfig
from mistral_core.generation.sampling import Rule, Values, numbers
from mistral_core.reference import engine
from mistral_core.reference import sampling as reference

from .cases import Case, padded, token_ids
from .compare import Comparison, compare
from .pieces import Subject, by_name, parameters_of
from .tolerances import Tolerance, tolerance

PLAIN = Case("texts", "the same seed gives the same tokens", TINY, "MistralForCausalLM", {})
KEYS = reference.row_keys((0, 1, 2**64 - 1), 3, 1)
STEPS = np.array([0, 1, 77], np.int32)
GUESSED = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
GREEDY = {"max_new_tokens": 12, "do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
ENDLESS = {"eos_token_id": None, "seed": 11}
TEXTS: Mapping[str, dict[str, Any]] = {
    "sampled": {"max_new_tokens": 64, **SAMPLED},
    "sampled, guessed": {"max_new_tokens": 24, **SAMPLED, **GUESSED},
    "greedy, guessed": {"max_new_tokens": 24, **GUESSED},
    "beams": {"max_new_tokens": 16, "num_beams": 3, "length_penalty": 0.5},
}

CHOICES: Mapping[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "temperature of next to nothing": {"temperature": 1e-8, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_k beyond the vocabulary": {"top_k": 10**6},
    "top_p": {"top_p": 0.6, "top_k": 0},
    "top_p of next to nothing": {"top_p": 1e-9, "top_k": 0},
    "min_p": {"min_p": 0.05, "top_k": 0},
    "typical_p": {"typical_p": 0.5, "top_k": 0},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 3.0},
    "all": {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3},
}


def noise(subject: Subject) -> Iterator[Comparison]:
    """The Gumbel noise of a few seeds and steps, for an even and an odd number of ids."""
    for size in (TINY.vocab_size, TINY.vocab_size + 1):
        step_BT = STEPS[:, None] + np.arange(2)
        found = subject.adapter.gumbel(KEYS, step_BT, size)
        bound = tolerance("noise", "float32", subject.implementation)
        key = (subject.key[0], subject.key[1], "float32")
        yield compare(key, f"{size} ids", "noise", found, reference.gumbel(KEYS, step_BT, size), bound)


def choices(subject: Subject, name: str) -> Iterator[Comparison]:
    """What an option leaves of some logits, the token chosen of it, and the candidates of a beam search."""
    options = {"do_sample": True, "output_scores": True, **CHOICES[name]}
    generation = GenerationConfig(**options)
    random = np.random.default_rng(5)
    logits = (4 * random.normal(size=(3, 2, TINY.vocab_size))).astype(np.float32)
    bias = np.where(random.random(logits.shape) < 0.2, -np.inf, random.normal(size=logits.shape)).astype(np.float32)
    seen = random.random(logits.shape) < 0.5 if generation.repetition_penalty != 1 else None
    values = Values(numbers(generation), KEYS, STEPS, bias, seen)
    key = (subject.key[0], subject.key[1], "float32")
    for candidates in (0, 4):
        rule = Rule.of(generation, candidates=candidates)
        found, wanted = subject.adapter.choose(logits, rule, values), reference.choose(logits, rule, values)
        case, same = f"{name}, {candidates} candidates", Tolerance(0.0, 1.0)
        bound = tolerance("scores", "float32", subject.implementation)
        assert found.scores is not None
        assert wanted.scores is not None
        out, kept = np.isneginf(found.scores), np.isneginf(wanted.scores)
        yield compare(key, case, "forbidden", out.astype(np.float32), kept, same)
        yield compare(key, case, "token", found.token.astype(np.float32), wanted.token, same)
        yield compare(key, case, "scores", np.where(out, 0, found.scores), np.where(kept, 0, wanted.scores), bound)
        if wanted.candidates is not None:
            assert found.candidates is not None
            there = np.isfinite(wanted.candidates[0])  # fewer may be left than are asked for
            bounds = {"noisy": bound, "scored": bound, "tokens": same}
            for piece, one, other in zip(bounds, found.candidates, wanted.candidates, strict=True):
                actual = np.where(there, one, 0).astype(np.float32)
                yield compare(key, case, f"candidates {piece}", actual, np.where(there, other, 0), bounds[piece])


def nothing_to_choose(subject: Subject) -> Iterator[Comparison]:
    """A NaN anywhere, an infinity, or -inf everywhere gives -1, not a token; a row beside it keeps its own."""
    logits = np.zeros((4, 1, TINY.vocab_size), np.float32)
    logits[0, 0, 50], logits[1, 0, 3], logits[2], logits[3, 0, 7] = np.nan, np.inf, -np.inf, 1
    for sample in (False, True):
        generation = GenerationConfig(do_sample=sample, temperature=1e-6, top_p=0.9)
        values = Values(numbers(generation), np.zeros((4, 2), np.uint32), np.zeros(4, np.int32))
        found = subject.adapter.choose(logits, Rule.of(generation), values).token[:, 0]
        key = (subject.key[0], subject.key[1], "float32")
        wanted = np.array([-1, -1, -1, 7])
        yield compare(key, f"sample {sample}", "token", found.astype(np.float32), wanted, Tolerance(0.0, 1.0))


def texts(subject: Subject, options: Mapping[str, Any], case: Case = PLAIN, rows: int = 3) -> Iterator[Comparison]:
    """Tokens of a ragged batch, or of its first rows, are the reference's own, for the same seed, guessed or not."""
    given = {"attention_mask": padded("left")[:rows], **ENDLESS, **options}
    found = subject.adapter.numpy(subject.model(case).generate(token_ids(case.config)[:rows], **given))
    written = {name: value for name, value in options.items() if name not in GUESSED}
    wanted = _continued(tuple(written.items()), case.name, rows)
    yield compare(subject.key, case.name, "tokens", found, wanted, Tolerance(0.0, 1.0))


@functools.cache
def _continued(options: tuple[tuple[str, Any], ...], name: str, rows: int) -> Array:
    """What the reference writes, which guesses nothing."""
    case = PLAIN if name == PLAIN.name else by_name(name)
    given = {"attention_mask": padded("left")[:rows], **ENDLESS, **dict(options)}
    ids = token_ids(case.config)[:rows]
    return np.asarray(engine.generate(case.config, parameters_of(case, "float32"), ids, **given).sequences)
