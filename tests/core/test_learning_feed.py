"""Feed: packing, padding, the order of a seed, what a loss is divided by, and going on where a state was taken."""

from __future__ import annotations

import json
import random
import tracemalloc
from itertools import groupby, islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import InputError, MissingLabelsError
from mistral_core.learning import Examples, Feed, feed
from mistral_core.learning.order import permutation
from mistral_core.learning.packing import best_fit, windows
from mistral_core.reference import heads
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.validate import IGNORE

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer():
    return MistralTokenizer.from_pretrained(TINY_CHECKPOINT, version="v1")


@pytest.fixture(scope="module")
def make(tmp_path_factory, tokenizer):
    """The examples of rows."""
    path = tmp_path_factory.mktemp("data")

    def make(rows, *, length=LENGTH, **options):
        file = path / f"{random.Random(repr(rows)).getrandbits(64)}.jsonl"
        if not file.exists():  # one that is read must stay as it is
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Examples(file, tokenizer, length=length, **options)

    return make


def text(words, number=0):
    """A text whose tokens are a word each, all but the end of sequence told by its number."""
    return {"text": " ".join(["was", "not", "at", "all", "pleased"][(number + at) % 5] for at in range(words))}


def answer(asked, said):
    return {"prompt": " was" * asked, "completion": " not" * said}


def preference(number):
    return {"prompt": "Who came?", "chosen": " was" * (1 + number % 4), "rejected": " not at"}


TEXTS = [text(1 + (7 * number) % 14, number) for number in range(60)]
KINDS = {
    "packed": (TEXTS, {}, {}),
    "padded": (TEXTS, {}, {"pack": False}),
    "answers": ([answer(1 + number % 17, 1 + number % 5) for number in range(40)], {}, {}),
    "preferences": ([preference(number) for number in range(23)], {}, {}),
    "classes": ([{**each, "label": at % 3} for at, each in enumerate(TEXTS)], {"labels": 3}, {}),
    "words": ([{"tokens": ["was"] * (1 + at % 9), "labels": [at % 3] * (1 + at % 9)} for at in range(40)],
              {"labels": 3}, {}),
}  # fmt: skip
DROPPED = pytest.mark.filterwarnings("ignore:.* leave nothing to learn")


@pytest.fixture
def fed(make, monkeypatch):
    """A feed of a kind, with windows so small that there are many."""
    monkeypatch.setattr(feed, "WINDOW_ROWS", 3)

    def fed(kind, **options):
        rows, of_examples, of_feed = KINDS[kind]
        return Feed(make(rows, **of_examples), **{"rows": 2, "accumulate": 2, **of_feed, **options})

    return fed


def documents(batch):
    """(input_ids, labels, line) of each example in a batch, by its own marks."""
    found = []
    for row, numbers in enumerate(batch.lines):
        for number, line in enumerate(numbers):
            marks = batch.document_ids if batch.attention_mask is None else 1 - batch.attention_mask
            here = np.flatnonzero(marks[row] == number)
            assert (np.diff(here) == 1).all()
            labels = batch.labels[row] if batch.labels.ndim == 1 else batch.labels[row][here]
            found.append((batch.input_ids[row][here].tolist(), labels.tolist(), line))
    return found


def plain(step):
    """A step as what can be compared."""
    batches = [({name: each.tolist() for name, each in b.arguments().items()}, b.lines) for b in step.batches]
    return batches, step.num_items_in_batch, step.epoch


# Packing


@given(st.lists(st.integers(1, 32), max_size=60), st.integers(32, 40))
def test_best_fit_keeps_everything_and_opens_no_row_that_is_not_needed(lengths, room):
    rows = best_fit(lengths, room)
    assert sorted(each for row in rows for each in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    assert rows == sorted(rows)
    filled = sorted(sum(lengths[each] for each in row) for row in rows)
    assert all(total <= room for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > room, "the first of a row fitted into no other"
    assert len(rows) <= first_come(lengths, room)


def first_come(lengths, room):
    """The rows that neighbours fill, each begun where the last one is full."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, room
        left -= length
    return rows


def test_rows_are_fuller_than_those_of_neighbours():
    chance = random.Random(0)
    lengths = [chance.randint(1, 100) for _ in range(1000)]
    rows = sum(len(best_fit(each, 100)) for each in windows(((length, length) for length in lengths), 64 * 100))
    wanted = sum(lengths) / 100
    assert wanted <= rows < 1.04 * wanted
    assert first_come(lengths, 100) > 1.3 * wanted


def test_windows_are_neighbours_of_some_size():
    assert list(windows([("a", 2), ("b", 2), ("c", 0), ("d", 5), ("e", 1)], 4)) == [["a", "b"], ["c", "d"], ["e"]]


# What is fed


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30), st.booleans(), st.booleans(),
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**64 - 1),
)  # fmt: skip
@DROPPED
def test_an_epoch_has_every_example_once_whole_and_apart(make, lengths, pack, shuffle, rows, accumulate, seed):
    examples = make([answer(*each) for each in lengths] + [answer(1, 1)])
    given = Feed(examples, rows=rows, accumulate=accumulate, seed=seed, shuffle=shuffle, pack=pack)
    steps = list(given.steps(epochs=1))
    assert len(steps) == given.count_steps()
    found = [each for step in steps for batch in step.batches for each in documents(batch)]
    wanted = [part for index in range(len(examples)) for part in examples[index].parts]
    assert sorted(found, key=lambda each: each[2]) == [(ids.tolist(), labels.tolist(), n) for ids, labels, n in wanted]
    if not (pack or shuffle):
        assert [line for *_, line in found] == [part.line for part in wanted]
    assert given.counts == examples.counts()
    for step in steps:
        assert 1 <= len(step.batches) <= accumulate
        counted = 0
        for batch in step.batches:
            assert len(batch.input_ids) == len(batch.lines) == rows
            marks = batch.document_ids if pack else batch.attention_mask
            assert batch.input_ids.shape == batch.labels.shape == marks.shape
            assert batch.input_ids.shape[1] == LENGTH
            assert all(labels[0] == IGNORE for _, labels, _ in documents(batch))
            labelled = sum(label != IGNORE for _, labels, _ in documents(batch) for label in labels)
            assert labelled == (batch.labels != IGNORE).sum(), "padding has no label"
            counted += labelled
        assert step.num_items_in_batch == counted
        assert all(len(batch.lines[-1]) for batch in step.batches[:-1]), "only a last batch has rows of padding"


def test_padding_is_told_apart_and_no_row_is_without_a_token(fed):
    (*_, last) = fed("packed", rows=7, accumulate=1).steps(epochs=1)
    (batch,) = last.batches
    assert () in batch.lines
    for row, numbers in enumerate(batch.lines):
        runs = [number for number, _ in groupby(batch.document_ids[row].tolist())]
        assert runs in (list(range(len(numbers))), list(range(len(numbers) + 1)))
    (*_, last) = fed("padded", rows=7, accumulate=1).steps(epochs=1)
    (batch,) = last.batches
    assert batch.lines[-1] == ()
    assert batch.attention_mask.sum(axis=1).min() == 1
    assert (batch.labels[-1] == IGNORE).all()


def test_rows_are_padded_to_the_longest_of_a_batch(make):
    examples = make([text(3), text(20), text(6), text(1)], length=100)
    found = Feed(examples, rows=2, pack=False, shuffle=False, pad_to_multiple_of=8).steps(epochs=1)
    longest = len(examples[1].parts[0].input_ids)
    assert [step.batches[0].input_ids.shape for step in found] == [(2, -(-longest // 8) * 8), (2, 8)]
    found = Feed(make([text(200)], length=100), rows=1, pack=False, pad_to_multiple_of=64).steps(epochs=1)
    assert next(iter(found)).batches[0].input_ids.shape == (1, 100)


@pytest.mark.parametrize("kind", ["packed", "padded", "answers"])
@DROPPED
def test_the_loss_of_a_step_is_that_of_its_examples_one_by_one(fed, kind):
    """In float64, by the reference: rows and documents keep to themselves, and every label counts once."""
    config = TINY.replace(vocab_size=2048)
    parameters = {name: each.astype(np.float64) for name, each in random_parameters(config).items()}
    given = fed(kind)
    step = next(iter(given.steps()))
    total = sum(
        heads.causal_lm(
            config, parameters, **batch.arguments(), num_items_in_batch=step.num_items_in_batch
        ).loss
        for batch in step.batches
    )  # fmt: skip
    losses, count = 0.0, 0
    for ids, labels, _ in (each for batch in step.batches for each in documents(batch)):
        losses += heads.causal_lm(
            config, parameters, np.array([ids]), labels=np.array([labels]), num_items_in_batch=1
        ).loss
        count += sum(label != IGNORE for label in labels)
    assert len(step.batches) == 2
    assert count == step.num_items_in_batch
    assert total == pytest.approx(losses / count, rel=1e-13)


def test_pairs_stand_in_the_two_halves_of_a_batch(fed, tokenizer):
    given = fed("preferences", rows=3, accumulate=2, shuffle=False)
    steps = list(given.steps(epochs=1))
    assert [step.num_items_in_batch for step in steps] == [6, 6, 6, 5]
    batch = steps[-1].batches[-1]
    assert batch.lines == ((22,), (23,), (), (22,), (23,), ())
    assert batch.input_ids.shape == (6, 16)
    assert batch.document_ids is None
    chosen, rejected = (batch.labels[row][batch.labels[row] != IGNORE].tolist() for row in (0, 3))
    assert tokenizer.decode(chosen) == "was was</s>"
    assert tokenizer.decode(rejected) == "not at</s>"


def test_classes_have_one_label_a_row_and_words_one_a_word(fed):
    step = next(iter(fed("classes", rows=7, accumulate=9, shuffle=False).steps()))
    assert step.num_items_in_batch == 60
    assert step.batches[0].labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert step.batches[-1].labels.tolist() == [2, 0, 1, 2, IGNORE, IGNORE, IGNORE]
    words = next(iter(fed("words", rows=40, accumulate=1).steps()))
    assert words.num_items_in_batch == sum(1 + at % 9 for at in range(40))
    assert words.batches[0].document_ids is not None


# The order


def test_an_order_is_a_function_of_seed_and_epoch():
    """The numbers are pinned: an order that changes with a version would end a run that is resumed."""
    assert permutation(10, seed=7, path=(0,)).tolist() == [6, 2, 5, 9, 7, 1, 3, 0, 4, 8]
    assert permutation(10, seed=7, path=(1,)).tolist() == [6, 0, 9, 3, 5, 2, 7, 1, 8, 4]
    assert permutation(10, seed=7 << 32, path=(1,)).tolist() == [3, 1, 4, 2, 0, 6, 8, 7, 9, 5]
    assert permutation(10, seed=7, path=(0, 0)).tolist() == [3, 7, 4, 8, 1, 0, 9, 6, 2, 5]
    assert permutation(0, seed=0, path=(0,)).tolist() == []
    assert sorted(permutation(1000, seed=2**64 - 1, path=(2**32 - 1,))) == list(range(1000))


def test_rows_of_a_seed_are_pinned_too(fed):
    given = fed("packed", seed=5).steps(epochs=1)
    rows = [row for step in islice(given, 3) for batch in step.batches for row in batch.lines]
    assert rows == [
        (56, 11, 43), (24,), (50,), (48,), (38,), (46, 3, 23), (17, 29, 14), (27, 9, 31), (15, 60, 13), (28,),
        (7, 36, 1), (44, 37),
    ]  # fmt: skip


def test_every_place_comes_everywhere():
    """Over 2000 epochs, a number's mean place is the middle: 2.9 / sqrt(2000) = 0.064 is one standard deviation."""
    places = np.array([permutation(10, seed=3, path=(epoch,)) for epoch in range(2000)])
    assert np.abs(places.mean(axis=0) - 4.5).max() < 5 * 0.065


def test_epochs_differ_and_seeds_do_and_a_file_has_its_own_order(fed):
    def lines(**options):
        return [
            [row for batch in step.batches for row in batch.lines] for step in fed("padded", **options).steps(epochs=2)
        ]

    first, again, other, plain_order = lines(seed=1), lines(seed=1), lines(seed=2), lines(shuffle=False)
    assert first == again
    assert first != other
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    assert [each for step in plain_order for (each,) in step] == [*range(1, 61)] * 2


# Going on


@pytest.mark.parametrize("kind", KINDS)
@DROPPED
def test_what_follows_a_state_is_the_same_to_the_bit(fed, kind):
    whole = fed(kind, seed=5)
    steps, states, counts = [], [], []
    states.append(json.dumps(whole.state()))
    for step in whole.steps(epochs=2):
        steps.append(plain(step))
        states.append(json.dumps(whole.state()))
        counts.append(whole.counts)
    assert whole.counts == whole.examples.counts(), "of the last epoch alone"
    assert len(steps) > 6
    assert {epoch for *_, epoch in steps} == {0, 1}
    assert max(map(len, states)) < 1000
    for at, state in enumerate(states):
        later = fed(kind, seed=5)
        later.restore(json.loads(state))
        for number, step in enumerate(later.steps(epochs=2), at):
            assert plain(step) == steps[number]
            assert later.counts == counts[number]
            if number > at + 2:
                break
        else:
            assert len(steps) - at <= 3
    assert fed(kind, seed=5).count_steps(epochs=2) == len(steps)


def test_a_state_may_go_on_in_batches_of_another_size(fed):
    def rows(given):
        return [row for step in given.steps(epochs=1) for batch in step.batches for row in batch.lines if row]

    whole = fed("packed", rows=4)
    first = [row for step in islice(whole.steps(), 2) for batch in step.batches for row in batch.lines]
    later = fed("packed", rows=3, accumulate=1)
    later.restore(whole.state())
    assert first + rows(later) == rows(fed("packed"))


def test_a_state_of_something_else_is_refused(fed, make, monkeypatch):
    given = fed("packed", seed=5)
    next(iter(given.steps()))
    state = given.state()
    for other, told in (
        (fed("packed", seed=6), "seed 5 then, 6 now"),
        (fed("packed", seed=5, shuffle=False), "shuffle True then, False now"),
        (fed("packed", seed=5, pack=False), "pack True then, False now"),
        (Feed(make(TEXTS, length=17), rows=2, seed=5), "length 16 then, 17 now"),
        (Feed(make(TEXTS[:-1]), rows=2, seed=5), "sha256 "),
    ):
        with pytest.raises(InputError, match=f"state must be of the same feed.*{told}"):
            other.restore(state)
    monkeypatch.setattr(feed, "WINDOW_ROWS", 4)
    with pytest.raises(InputError, match="window 3 then, 4 now"):
        fed("packed", seed=5).restore({**state})
    monkeypatch.setattr(feed, "WINDOW_ROWS", 3)
    for change, told in (
        ({"row": -1}, "state must hold numbers"),
        ({"place": 1.0}, "state must hold numbers"),
        ({"counts": [1]}, "state must hold numbers"),
        ({"counts": None}, "state must hold numbers"),
        ({"place": 61}, "place must be at most 60, got 61"),
        ({"of": 3}, "must be of the same feed"),
        ({"more": 1}, r"state must be what `state\(\)` gave"),
    ):
        with pytest.raises(InputError, match=told):
            given.restore({**state, **change})
    with pytest.raises(InputError, match="state must be what"):
        given.restore([])
    assert given.state() == state


def test_arguments_that_are_none(make):
    examples = make(TEXTS)
    for options, told in (
        ({"rows": 0}, "rows must be a positive integer, got 0"),
        ({"rows": 1, "accumulate": True}, "accumulate must be a positive integer, got True"),
        ({"rows": 1, "pad_to_multiple_of": 1.5}, "pad_to_multiple_of must be"),
        ({"rows": 1, "seed": -1}, r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
        ({"rows": 1, "seed": 1 << 64}, "seed must be"),
    ):
        with pytest.raises(InputError, match=told):
            Feed(examples, **options)
    with pytest.raises(InputError, match="pack must be False for the kind preference"):
        Feed(make([preference(0)]), rows=1, pack=True)


def test_examples_of_which_nothing_is_left_do_not_go_on_for_ever(make):
    with (
        pytest.warns(UserWarning, match="leave nothing to learn"),
        pytest.raises(MissingLabelsError, match="of every example the first 16 tokens leave nothing"),
    ):
        list(Feed(make([answer(30, 1)] * 3), rows=1).steps())


def test_memory_does_not_grow_with_the_examples(fed, make):
    def peak(count):
        given = Feed(make([text(12, number) for number in range(count)]), rows=8)
        tracemalloc.start()
        try:
            for _ in given.steps(epochs=1):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)
    few, many = peak(200), peak(2000)
    assert many - few < 2000 * 100, "an order of eight bytes a line and what makes it, but no example"
