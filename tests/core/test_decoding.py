"""The decode driver over the float64 reference: what each option means, by an independent computation of it."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import GenerationConfig
from mistral_core.config.presets import TINY
from mistral_core.errors import GenerationConfigError, InputError
from mistral_core.generation import driver
from mistral_core.generation.guesses import prompt_lookup
from mistral_core.generation.history import repeating
from mistral_core.generation.sampling import Rule
from mistral_core.reference import engine, heads
from mistral_core.reference.cache import KVCache

PARAMETERS = random_parameters(TINY, "MistralForCausalLM")
OTHER = {n: x + 0.02 * np.random.default_rng(3).normal(size=x.shape) for n, x in PARAMETERS.items()}
IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 9))
MASK = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 0]])  # padded on the left, inside and behind
ENDLESS = {"eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3, **ENDLESS}


def written(ids=IDS, **options):
    return engine.generate(TINY, PARAMETERS, ids, **{**ENDLESS, **options})


def new(ids=IDS, **options):
    return written(ids, **options).sequences[:, np.shape(ids)[1] :]


def logits(row):
    return heads.causal_lm(TINY, PARAMETERS, np.array([row])).logits[0, -1]


# Rows


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_a_row_is_the_row_alone_wherever_its_padding_is(options):
    seeds = {"seed": [7, 8]} if options else {}
    batch = new(attention_mask=MASK, max_new_tokens=13, **{**options, **seeds})
    for row in range(2):
        alone = IDS[row][MASK[row] != 0][None]
        given = {**options, **({"seed": [seeds["seed"][row]]} if options else {})}
        assert np.array_equal(batch[row], new(alone, max_new_tokens=13, **given)[0])


def test_what_comes_back_marks_what_is_real():
    first = new(max_new_tokens=8)
    out = written(attention_mask=MASK, max_new_tokens=0)
    assert np.array_equal(out.sequences, IDS)
    end = int(first[0, 2])
    out = written(max_new_tokens=8, eos_token_id=end, pad_token_id=1)
    stop = [row.tolist().index(end) + 1 if end in row else 8 for row in first]
    assert out.attention_mask.sum(1).tolist() == [9 + n for n in stop]
    assert (out.sequences[out.attention_mask == 0] == 1).all()
    assert out.past_key_values.length.tolist() == [9 + n - 1 for n in stop]  # all but the last token of each


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_a_prompt_in_chunks_is_the_whole_prompt(chunk):
    for options in ({}, SAMPLED):
        wanted = written(max_new_tokens=7, attention_mask=MASK, **options)
        found = written(max_new_tokens=7, attention_mask=MASK, prefill_chunk_size=chunk, **options)
        assert np.array_equal(found.sequences, wanted.sequences)
        for one, other in zip(found.past_key_values.keys, wanted.past_key_values.keys, strict=True):
            used = np.arange(one.shape[1]) < found.past_key_values.length.min()
            assert np.allclose(one[:, used], other[:, used], atol=1e-12)


def test_chunks_bound_what_is_computed_at_once():
    class Widths(engine.Engine):
        seen = ()

        def step(self, cache, ids_BT, *rest):
            self.seen += (ids_BT.shape[1],)
            return super().step(cache, ids_BT, *rest)

    subject = Widths(TINY, PARAMETERS)
    options = {"max_new_tokens": 2, "prefill_chunk_size": 4}
    driver.generate(subject, driver.prepare(TINY, IDS, None, GenerationConfig(), options))
    assert subject.seen == (4, 4, 1, 1), "what is left comes last: a text that begins whole needs no mask"


# Options that look back


def test_min_new_tokens_holds_the_end_back():
    free = new(max_new_tokens=10)[0].tolist()
    end = free[3]
    early = written(IDS[:1], max_new_tokens=10, eos_token_id=end).sequences[0, 9:].tolist()
    assert early == free[: free.index(end) + 1]
    held = written(IDS[:1], max_new_tokens=10, min_new_tokens=6, eos_token_id=end).sequences[0, 9:].tolist()
    assert end not in held[:6]
    assert held[: free.index(end)] == free[: free.index(end)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice(n):
    # two ids that the model likes to repeat leave few ways around
    row = [5, 6, 5, 6, 5]
    tokens = [*row, *new([row], max_new_tokens=40, no_repeat_ngram_size=n, logit_bias={5: 9.0, 6: 9.0})[0].tolist()]
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = len(grams) - len(set(grams))
    given = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    assert repeated == len(given) - len(set(given))


def test_repeating_finds_what_would_repeat():
    assert repeating(np.array([1, 2, 3, 1, 2]), 3).tolist() == [3]
    assert repeating(np.array([1, 2, 1, 3, 1]), 2).tolist() == [2, 3]
    assert repeating(np.array([1, 2]), 1).tolist() == [1, 2]
    assert repeating(np.array([1]), 2).tolist() == []


def test_bad_words_do_not_come_and_their_beginnings_may():
    free = new(max_new_tokens=12)[0].tolist()
    word = free[2:4]
    single = next(token for token in free[4:] if token not in free[:4])
    tokens = new(IDS[:1], max_new_tokens=12, bad_words_ids=[word, [single]])[0].tolist()
    assert single not in tokens
    assert word not in [tokens[i : i + 2] for i in range(len(tokens) - 1)]
    assert tokens[:3] == free[:3]  # its first token came, its second did not


def test_logit_bias_is_added():
    first = int(new(max_new_tokens=1)[0, 0])
    scores = logits(IDS[0].tolist())
    lead = scores[first] - np.sort(scores)[-2]
    assert new(IDS[:1], max_new_tokens=1, logit_bias={first: -lead * 0.99})[0, 0] == first
    assert new(IDS[:1], max_new_tokens=1, logit_bias={first: -lead * 1.01})[0, 0] == np.argsort(scores)[-2]


def test_repetition_penalty_is_the_formula():
    row, penalty = IDS[0].tolist(), 1.7
    for token in new(IDS[:1], max_new_tokens=10, repetition_penalty=penalty)[0].tolist():
        scores = logits(row)
        for one in set(row):
            scores[one] = scores[one] * penalty if scores[one] < 0 else scores[one] / penalty
        assert token == scores.argmax()
        row.append(token)


def test_nothing_left_to_choose_is_an_error():  # 108
    everything = [[token] for token in range(TINY.vocab_size)]
    with pytest.raises(GenerationConfigError, match="forbid every token"):
        new(max_new_tokens=1, bad_words_ids=everything)


# Sampling


def test_seeds_say_what_is_drawn():
    three = new(IDS[:1], max_new_tokens=9, num_return_sequences=3, **SAMPLED)
    assert len({tuple(row) for row in three.tolist()}) == 3
    assert np.array_equal(three, new(np.repeat(IDS[:1], 3, axis=0), max_new_tokens=9, **SAMPLED))  # stream r for row r
    assert np.array_equal(three, new(IDS[:1], max_new_tokens=9, num_return_sequences=3, **SAMPLED))
    assert not np.array_equal(three, new(IDS[:1], max_new_tokens=9, num_return_sequences=3, **{**SAMPLED, "seed": 4}))
    own = {**SAMPLED, "seed": [4, 9]}
    turned = {**SAMPLED, "seed": [9, 4]}
    assert np.array_equal(new(max_new_tokens=9, **own), new(IDS[::-1], max_new_tokens=9, **turned)[::-1])
    copies = new(max_new_tokens=9, num_return_sequences=2, **own)
    assert np.array_equal(
        copies[2:], new(IDS[1:], max_new_tokens=9, num_return_sequences=2, **{**SAMPLED, "seed": [9]})
    )


def test_without_a_seed_every_call_is_another():
    given = {**SAMPLED, "seed": None, "max_new_tokens": 20}
    assert not np.array_equal(new(**given), new(**given))


def test_temperature_0_is_greedy():  # 105
    assert np.array_equal(new(max_new_tokens=9, do_sample=True, temperature=0), new(max_new_tokens=9))
    assert np.array_equal(new(max_new_tokens=9, do_sample=True, temperature=1e-8, seed=1), new(max_new_tokens=9))


def test_the_rule_holds_what_is_in_force_only():
    assert Rule.of(GenerationConfig(top_k=5)) == Rule()
    assert Rule.of(GenerationConfig(do_sample=True)) == Rule(True, ("top_k",))
    assert Rule.of(GenerationConfig(do_sample=True, top_k=0, min_p=0.1, temperature=0.5)).filters == (
        "temperature",
        "min_p",
    )


# Guesses


def test_prompt_lookup_takes_the_latest_of_the_longest():
    assert prompt_lookup([1, 2, 3, 9, 2, 3, 4, 5, 2, 3], 2, 2) == [4, 5]
    assert prompt_lookup([1, 2, 3, 9, 2, 3, 4, 5, 2, 3], 9, 2) == [4, 5, 2, 3]
    assert prompt_lookup([7, 3, 8, 2, 3], 3, 2) == [8, 2, 3]
    assert prompt_lookup([1, 2, 3], 3, 2) == []
    assert prompt_lookup([1, 1], 0, 2) == []


class Counting(engine.Engine):
    """The reference, which counts how often it is asked."""

    steps = 0

    def step(self, *given):
        self.steps += 1
        return super().step(*given)


@pytest.mark.parametrize("options", [{}, SAMPLED, {**SAMPLED, "no_repeat_ngram_size": 2, "min_new_tokens": 3}])
@pytest.mark.parametrize("assistant", [PARAMETERS, OTHER, None], ids=["itself", "another", "lookup"])
@pytest.mark.parametrize("copies", [1, 2])
def test_guesses_change_no_token(options, assistant, copies):
    if copies > 1 and not options:
        options = {**SAMPLED, "repetition_penalty": 1.0}
    text = np.tile(IDS, 2) % 17 + 3  # which repeats itself
    given = {**ENDLESS, "max_new_tokens": 33, "num_return_sequences": copies, **options}
    mask = np.ones_like(text)
    mask[1, :5] = 0
    wanted = driver.generate(plain := Counting(TINY, PARAMETERS), prepared(text, mask, given))
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1} if assistant is None else {}
    guessing = None if assistant is None else engine.Engine(TINY, assistant)
    subject = Counting(TINY, PARAMETERS)
    found = driver.generate(subject, prepared(text, mask, {**given, **lookup}), assistant=guessing)
    assert np.array_equal(found.sequences, wanted.sequences)
    assert found.past_key_values.length.tolist() == wanted.past_key_values.length.tolist()
    if assistant is not None:
        assert subject.steps < plain.steps * (0.4 if assistant is PARAMETERS else 0.9)
    # what is left of the cache is exact: it continues as if nothing had been guessed
    longer = np.concatenate([found.sequences, IDS[:, :2].repeat(copies, 0)], axis=1)
    longer_mask = np.concatenate([found.attention_mask, np.ones((len(longer), 2), int)], axis=1)
    after = {"max_new_tokens": 3, "attention_mask": longer_mask}
    assert np.array_equal(new(longer, past_key_values=found, **after), new(longer, **after))


def prepared(ids, mask, options):
    return driver.prepare(TINY, ids, mask, GenerationConfig(), options)


def test_guesses_stop_at_an_end_inside_them():
    end = int(new(max_new_tokens=6)[0, 3])
    given = {"max_new_tokens": 20, "eos_token_id": end, "num_assistant_tokens": 8}
    wanted = driver.generate(engine.Engine(TINY, PARAMETERS), prepared(IDS, None, given))
    found = driver.generate(
        engine.Engine(TINY, PARAMETERS), prepared(IDS, None, given), assistant=engine.Engine(TINY, PARAMETERS)
    )
    assert np.array_equal(found.sequences, wanted.sequences)
    assert found.past_key_values.length.tolist() == (found.attention_mask.sum(1) - 1).tolist()


def test_an_assistant_of_another_vocabulary_is_refused():
    other = TINY.replace(vocab_size=96)
    assistant = engine.Engine(other, random_parameters(other, "MistralForCausalLM"))
    with pytest.raises(GenerationConfigError, match="vocab_size must be 97, got 96"):
        driver.generate(engine.Engine(TINY, PARAMETERS), prepared(IDS, None, {}), assistant=assistant)


@pytest.mark.parametrize("assistant", [None, OTHER], ids=["plain", "assistant"])
def test_sampled_tokens_are_distributed_as_the_model_says(assistant):
    """The second token of 3000 draws against its exact distribution, by chi-square over its likeliest values."""
    draws, prompt = 3000, IDS[:1, :3]
    options = {"max_new_tokens": 2, "do_sample": True, "temperature": 0.7, "top_k": 6, "seed": 1, **ENDLESS}
    given = prepared(prompt, None, {**options, "num_return_sequences": draws})
    helper = None if assistant is None else engine.Engine(TINY, assistant)
    out = driver.generate(engine.Engine(TINY, PARAMETERS), given, assistant=helper)
    tokens, counts = np.unique(out.sequences[:, 4], return_counts=True)
    expected = np.zeros(TINY.vocab_size)
    for first, chance in enumerate(distribution(prompt[0].tolist())):
        if chance:
            expected += chance * distribution([*prompt[0].tolist(), first])
    assert (expected[tokens] > 0).all()
    large = expected * draws >= 5
    observed = np.zeros(TINY.vocab_size)
    observed[tokens] = counts
    statistic = ((observed - expected * draws)[large] ** 2 / (expected * draws)[large]).sum()
    degrees = large.sum()
    assert statistic < degrees + 4 * np.sqrt(2 * degrees), (statistic, degrees)


def distribution(row):
    scores = logits(row) / 0.7
    scores[np.argsort(scores)[:-6]] = -np.inf
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


# Turns


@pytest.mark.parametrize("cache", ["auto", "full"])
@pytest.mark.parametrize("chosen", [{}, SAMPLED])
def test_a_second_turn_computes_its_own_tokens_only(cache, chosen):
    mask = MASK
    out = written(attention_mask=mask, max_new_tokens=10, cache=cache, **chosen)
    more = np.concatenate([out.sequences, IDS[:, :3]], axis=1)
    mask = np.concatenate([out.attention_mask, np.ones((2, 3), int)], axis=1)
    options = {"attention_mask": mask, "max_new_tokens": 8, "cache": cache, **chosen}
    wanted = new(more, **options)

    class Columns(engine.Engine):
        seen = 0

        def step(self, cache, ids_BT, *rest):
            self.seen += ids_BT.shape[1]
            return super().step(cache, ids_BT, *rest)

    before = [x.copy() for x in out.past_key_values.keys]
    for past in (out, out.past_key_values):
        subject = Columns(TINY, PARAMETERS)
        given = {name: value for name, value in options.items() if name != "attention_mask"}
        found = driver.generate(subject, prepared(more, mask, {**ENDLESS, **given}), past=past)
        assert np.array_equal(found.sequences[:, more.shape[1] :], wanted)
        assert subject.seen == 1 + 3 + 7  # the last token of the first turn, three new ones, and one at a time
        assert all(np.array_equal(a, b) for a, b in zip(before, out.past_key_values.keys, strict=True))


def test_a_turn_that_was_edited_goes_back_exactly():
    out = written(max_new_tokens=10)
    for keep in (18, 12, 9, 3, 1):
        edited = np.concatenate([out.sequences[:, :keep], (IDS[:, :4] + 1) % TINY.vocab_size], axis=1)
        assert np.array_equal(new(edited, max_new_tokens=5, past_key_values=out), new(edited, max_new_tokens=5))


def test_a_ring_that_cannot_go_back_so_far_is_filled_anew_or_said():
    long = np.random.default_rng(1).integers(3, TINY.vocab_size, (1, 90))
    out = written(long, max_new_tokens=3)
    edited = long[:, :20]
    assert np.array_equal(new(edited, max_new_tokens=5, past_key_values=out), new(edited, max_new_tokens=5))
    with pytest.raises(InputError, match="rollback"):
        new(edited, max_new_tokens=5, past_key_values=out.past_key_values)


def test_a_cache_of_a_forward_pass_is_continued():
    past = KVCache.allocate(TINY, 2)  # it grows
    past = heads.causal_lm(TINY, PARAMETERS, IDS[:, :6], past_key_values=past).past_key_values
    assert np.array_equal(new(max_new_tokens=12, past_key_values=past), new(max_new_tokens=12))
    with pytest.raises(InputError, match=r"must be \(3, 1, 2, 16\), got \(3, 2, 2, 16\)"):
        new(IDS[:1], past_key_values=past)
    with pytest.raises(InputError, match="must be a KVCache, got tuple"):
        new(past_key_values=((1, 2), (3, 4)))


# Beams


def test_beams_that_hold_everything_find_the_best_of_all():
    """With as many beams as tokens, two steps are an exhaustive search."""
    prompt = IDS[:1, :4]
    out = written(prompt, max_new_tokens=2, num_beams=TINY.vocab_size, num_return_sequences=5)
    first = log_softmax(logits(prompt[0].tolist()))
    totals = {}
    for token in range(TINY.vocab_size):
        second = log_softmax(logits([*prompt[0].tolist(), token]))
        totals |= {(token, other): (first[token] + second[other]) / 2 for other in range(TINY.vocab_size)}
    best = sorted(totals, key=totals.get, reverse=True)[:5]
    assert [tuple(row) for row in out.sequences[:, 4:].tolist()] == best
    assert np.allclose(out.sequences_scores, [totals[pair] for pair in best], atol=1e-6)


def log_softmax(scores):
    scores = scores - scores.max()
    return scores - np.log(np.exp(scores).sum())


def test_one_beam_is_greedy_and_rows_do_not_mix():
    both = written(attention_mask=MASK, max_new_tokens=6, num_beams=3)
    for row in range(2):
        alone = written(IDS[row][MASK[row] != 0][None], max_new_tokens=6, num_beams=3)
        assert np.array_equal(both.sequences[row, 9:], alone.sequences[0, -6:])
        assert np.isclose(both.sequences_scores[row], alone.sequences_scores[0])


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0, 2.0])
def test_beams_end(early, penalty):
    ends = tuple(range(20, 60))
    out = written(
        max_new_tokens=9, num_beams=4, num_return_sequences=4, eos_token_id=ends, pad_token_id=0, early_stopping=early,
        length_penalty=penalty,
    )  # fmt: skip
    for row, mask, score in zip(out.sequences, out.attention_mask, out.sequences_scores, strict=True):
        real = row[mask != 0].tolist()
        tokens = real[9:]
        assert not set(tokens[:-1]) & set(ends)
        assert len(tokens) == 9 or tokens[-1] in ends
        total = sum(log_softmax(logits(real[: 9 + i]))[token] for i, token in enumerate(tokens))
        assert np.isclose(score, total / len(tokens) ** penalty, atol=1e-5)


def test_drawn_beams_are_of_one_seed():
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": True, "temperature": 2.0, "top_k": 0}
    assert np.array_equal(new(**options, seed=1), new(**options, seed=1))
    assert len({tuple(new(IDS[:1], **options, seed=seed)[0].tolist()) for seed in range(6)}) > 1


def test_beams_are_not_guessed_and_several_rows_are_not_streamed():
    subject = engine.Engine(TINY, PARAMETERS)
    with pytest.raises(GenerationConfigError, match="num_beams"):
        driver.generate(subject, prepared(IDS, None, {"num_beams": 2}), assistant=subject)
    with pytest.raises(InputError, match="one row"):
        next(driver.stream(subject, prepared(IDS, None, {}), tokenizer=None))


# Scores and streamers


def test_scores_are_what_was_chosen_from():
    out = written(max_new_tokens=4, output_scores=True, eos_token_id=int(new(max_new_tokens=4)[0, 1]), pad_token_id=2)
    assert len(out.scores) == out.sequences.shape[1] - 9
    for row, column in itertools.product(range(2), range(len(out.scores))):
        wanted = logits(out.sequences[row, : 9 + column].tolist())
        if out.attention_mask[row, 9 + column]:
            assert np.allclose(out.scores[column][row], wanted, atol=1e-5)
        else:
            assert out.scores[column][row].argmax() == 2


class Streamer:
    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}])
def test_a_streamer_is_told_the_prompt_and_each_column(options):
    streamer = Streamer()
    ids = IDS % 9 + 3
    out = driver.generate(
        engine.Engine(TINY, PARAMETERS),
        prepared(ids, None, {**ENDLESS, "max_new_tokens": 12, **options}),
        streamer=streamer,
    )
    assert streamer.told == [ids.tolist(), *out.sequences[:, 9:].T.tolist()]
    assert streamer.ended == 1


def test_a_streamer_is_told_the_end_whatever_happens():  # 113
    class Breaking(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.told) == 3:
                raise KeyboardInterrupt

    streamer = Breaking()
    with pytest.raises(KeyboardInterrupt):
        driver.generate(engine.Engine(TINY, PARAMETERS), prepared(IDS, None, {}), streamer=streamer)
    assert streamer.ended == 1


class Together(engine.Engine):
    """One of two processes, here threads, that compute the same rows: both end where one does."""

    flags: ClassVar = []

    def __init__(self, rank, barrier):
        super().__init__(TINY, PARAMETERS)
        self.rank, self.barrier = rank, barrier

    def stops(self, here):
        self.flags[self.rank] = here
        self.barrier.wait(20)
        found = any(self.flags)
        self.barrier.wait(20)
        return found


class Enough:
    """A streamer that has enough after so many columns: it says so, fails, or runs out of time."""

    def __init__(self, columns, how):
        self.left, self.how = columns + 1, how  # the prompt is told first

    def put(self, column):
        self.left -= 1
        if self.left == 0 and self.how == "fails":
            raise OSError("the pipe is closed")
        return self.left == 0 and self.how == "says so"

    def end(self):
        pass


@pytest.mark.parametrize(("how", "beams"), [("says so", 1), ("fails", 1), ("time", 1), ("time", 2)])
def test_processes_that_compute_the_same_rows_end_together(how, beams, monkeypatch):
    barrier, found = threading.Barrier(2), [None, None]
    Together.flags = [False, False]
    clock = threading.local()
    for module in (driver, driver.beams):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def run(rank):
        clock.now, mine = 0.0, rank == 1 and how != "time"
        subject = Together(rank, barrier)

        class Clocked(type(subject)):
            def step(self, *given):
                clock.now += 1.0 + rank  # the second clock runs faster
                return super().step(*given)

        subject.__class__ = Clocked
        options = {**ENDLESS, "max_new_tokens": 9, "num_beams": beams, "max_time": 6.5 if how == "time" else None}
        try:
            found[rank] = driver.generate(
                subject, prepared(IDS, None, options), streamer=Enough(3, how) if mine else None
            ).sequences.shape[1]
        except OSError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended, other = found
    if how == "fails":
        assert isinstance(other, OSError)
    else:
        assert ended == other
    assert IDS.shape[1] < ended < IDS.shape[1] + 9, "the first process has not run on by itself"
