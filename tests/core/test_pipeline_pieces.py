"""What pipelines do beside the model, against the same said simply."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_core.config import MistralConfig
from mistral_core.errors import EmptyInputError, InputError
from mistral_core.pipelines import question_answering as qa
from mistral_core.pipelines import text_classification as classes
from mistral_core.pipelines import token_classification as tokens
from mistral_core.pipelines.base import Text, padded, softmax, stitched, trimmed, windows

TEXT = "Mr. Knightley, of  Donwell Abbey\u00a0(Surrey) lived\n well."
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "work-of-art"}


def spans_of(text, rng):
    """A text cut anywhere into tokens, blanks left out as `encoded` does."""
    cuts = sorted({0, len(text), *rng.integers(1, len(text), 20).tolist()})
    return [trimmed(text, *pair) for pair in itertools.pairwise(cuts)]


# Rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ids, mask = padded([[5, 6, 7], [8]], side=side)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0] if side == "right" else [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0] if side == "right" else [0, 0, 1]]


def test_padding_for_few_shapes():
    ids, mask = padded([[5] * 33, [8]], side="right", rows_at_least=4)
    assert ids.shape == mask.shape == (4, 64)
    assert mask.sum(axis=1).tolist() == [33, 1, 1, 1]
    assert padded([[5]], side="right", rows_at_least=1)[0].shape == (1, 32)
    for nothing in ([], [[3], []]):
        with pytest.raises(EmptyInputError):
            padded(nothing, side="left")


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 11), st.integers(0, 3), st.integers(0, 2))
def test_rows_of_a_long_text(length, room, stride, before, after):
    text = Text([-1] * before, list(range(length)), [-2] * after, [(i, i + 1) for i in range(length)])
    if stride >= room < length:
        with pytest.raises(InputError, match="make them longer or the overlap smaller"):
            windows(text, room + before + after, stride)
        return
    parts = windows(text, room + before + after, stride)
    assert all(len(part.row) <= room + before + after for part in parts)
    assert all(part.row == [-1] * before + text.ids[part.begin : part.end] + [-2] * after for part in parts)
    assert parts[0].begin == 0
    assert parts[-1].end == length
    assert all(one.end - two.begin == stride for one, two in itertools.pairwise(parts))
    assert [one.end for one in parts] == sorted({one.end for one in parts})
    said = [np.stack([np.array(part.row), np.full(len(part.row), index)], axis=1) for index, part in enumerate(parts)]
    read = stitched(parts, said)
    first = [min(index for index, part in enumerate(parts) if part.begin <= i < part.end) for i in range(length)]
    assert read.tolist() == [[i, index] for i, index in enumerate(first)]


@given(st.text(alphabet="a \n\u00a0", max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_spans_without_blanks(text, begin, more):
    end = min(len(text), begin + more)
    begin = min(begin, end)
    a, b = trimmed(text, begin, end)
    assert begin <= a <= b <= end
    assert text[a:b] == text[begin:end].strip()


def test_softmax():
    x = np.array([[1.0, 2.0, 1000.0], [-1000.0, -1000.0, 0.0]])
    assert np.allclose(softmax(x), [[0, 0, 1], [0, 0, 1]])
    assert np.allclose(softmax(x.T, axis=0), softmax(x).T)


# Classes


FUNCTIONS = [
    ({"num_labels": 3}, "softmax"),
    ({"num_labels": 1}, "sigmoid"),
    ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
    ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
    ({"num_labels": 1, "problem_type": "single_label_classification"}, "sigmoid"),
    ({"num_labels": 1, "problem_type": "regression"}, "none"),
    ({"num_labels": 3, "problem_type": "regression"}, "none"),
]


@pytest.mark.parametrize(("fields", "function"), FUNCTIONS)
def test_the_function_that_a_config_means(fields, function):
    config, x = MistralConfig(**fields), np.array([1.5, -800.0, 0.25])[: fields["num_labels"]]
    with np.errstate(over="ignore"):
        expected = {"softmax": np.exp(x) / np.exp(x).sum(), "sigmoid": 1 / (1 + np.exp(-x)), "none": x}[function]
    with np.errstate(all="raise", under="ignore"):
        assert np.allclose(classes.applied("default", config, x), expected)
        assert np.allclose(classes.applied(function, config, x), expected)


def test_equal_scores_stay_in_order():
    config = MistralConfig(id2label={0: "a", 1: "b", 2: "c"})
    for top, labels in ((None, "bac"), (2, "ba"), (9, "bac")):
        ranked = classes.ranked(config, np.array([0.0, 1.0, 0.0]), classes.TextClassificationOptions(top_k=top))
        assert "".join(each["label"] for each in ranked) == labels
    assert classes.ranked(config, np.array([2.0, 2.0, 1.0]), classes.TextClassificationOptions())["label"] == "a"


# Tokens and words


@pytest.mark.parametrize("seed", range(20))
def test_words_are_between_blanks(seed):
    rng = np.random.default_rng(seed)
    spans = spans_of(TEXT, rng)
    words = TEXT.split()
    starts = [sum(map(len, itertools.chain(words[:n]))) for n in range(len(words))]
    solid = [len("".join(TEXT[:begin].split())) for begin, _ in spans]
    for (begin, end), number, before in zip(spans, tokens.word_numbers(TEXT, spans), solid, strict=True):
        if begin < end:
            assert number == sum(start <= before for start in starts)
        else:
            assert number == min(sum(start < before for start in starts) + 1, len(words))


def merged_slowly(units):
    """(label, scores, begin, end) of neighbours with one label."""
    merged = []
    for label, score, begin, end in units:
        tag = label.removeprefix("B-").removeprefix("I-")
        if merged and merged[-1][0] == tag and not label.startswith("B-"):
            merged[-1] = (tag, [*merged[-1][1], score], merged[-1][2], end)
        else:
            merged.append((tag, [score], begin, end))
    return [(tag, sum(scores) / len(scores), begin, end) for tag, scores, begin, end in merged]


@pytest.mark.parametrize("strategy", tokens.STRATEGIES[1:])
@pytest.mark.parametrize("seed", range(5))
def test_entities(strategy, seed):
    rng = np.random.default_rng(seed)
    spans = [span for span in spans_of(TEXT, rng) if span[0] < span[1]]
    scores = softmax(rng.normal(size=(len(spans), len(LABELS))) * 2)
    words = tokens.word_numbers(TEXT, spans)
    groups = [[at] for at in range(len(spans))]
    if strategy != "simple":
        groups = [[at for at, number in enumerate(words) if number == word] for word in sorted(set(words))]
    units = []
    for group in groups:
        rows = [scores[at].tolist() for at in group]
        row = {
            "simple": rows[0],
            "first": rows[0],
            "max": max(rows, key=max),
            "average": [sum(column) / len(rows) for column in zip(*rows, strict=True)],
        }[strategy]
        units.append((LABELS[row.index(max(row))], max(row), spans[group[0]][0], spans[group[-1]][1]))
    ours = tokens.grouped(tokens.found(scores, spans, words, LABELS, strategy))
    expected = merged_slowly(units)
    assert [(label, begin, end) for label, _, begin, end in ours] == [(t, b, e) for t, _, b, e in expected]
    assert np.allclose([each.score for each in ours], [score for _, score, _, _ in expected])


def test_prefixes():
    def entities(*labels):
        units = [tokens.Unit(label, 1.0, at, at + 1) for at, label in enumerate(labels)]
        return [(each.label, each.begin, each.end) for each in tokens.grouped(units)]

    assert entities("B-PER", "I-PER", "B-PER", "B-PER") == [("PER", 0, 2), ("PER", 2, 3), ("PER", 3, 4)]
    assert entities("I-PER", "I-LOC", "O", "I-LOC") == [("PER", 0, 1), ("LOC", 1, 2), ("O", 2, 3), ("LOC", 3, 4)]
    assert entities("work-of-art", "work-of-art") == [("work-of-art", 0, 2)]


def test_blanks_that_are_tokens():
    text, spans = "a  b ", [(0, 1), (2, 2), (3, 4), (5, 5)]
    assert tokens.word_numbers(text, spans) == [1, 2, 2, 2]
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    units = tokens.found(scores, spans, [1, 2, 2, 2], {0: "O", 1: "X"}, "first")
    assert [(unit.label, text[unit.begin : unit.end]) for unit in units] == [("O", "a"), ("X", "b")]
    simple = tokens.grouped(tokens.found(scores[[0, 2, 3]], [spans[0], spans[2], spans[3]], [], {0: "O"}, "simple"))
    assert [(unit.label, text[unit.begin : unit.end]) for unit in simple] == [("O", "a  b")]


# Answers


def answers_slowly(context, spans, start, end, options):
    """(begin, end) -> probability, by every pair of tokens and by walking over characters."""

    def is_word(char):
        return char.isalnum()

    found = {}
    for first in range(len(spans)):
        for last in range(first, min(first + options.max_answer_len, len(spans))):
            begin, stop = spans[first][0], spans[last][1]
            while begin < stop and context[begin].isspace():
                begin += 1
            while begin < stop and context[stop - 1].isspace():
                stop -= 1
            if begin == stop:
                continue
            if options.align_to_words:
                while begin > 0 and is_word(context[begin]) and is_word(context[begin - 1]):
                    begin -= 1
                while stop < len(context) and is_word(context[stop - 1]) and is_word(context[stop]):
                    stop += 1
            found[begin, stop] = found.get((begin, stop), 0) + start[first] * end[last]
    return found


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_answers(align, nothing, seed):
    rng = np.random.default_rng(seed)
    spans = spans_of(TEXT, rng)
    options = qa.QuestionAnsweringOptions(
        top_k=1000, max_answer_len=int(rng.integers(1, 30)), align_to_words=align, handle_impossible_answer=nothing
    )
    logits = rng.normal(size=(2, len(spans))) * 3
    null = rng.normal(size=2) if nothing else None
    start, end = (softmax(np.append(each, null[at]) if nothing else each) for at, each in enumerate(logits))
    expected = answers_slowly(TEXT, spans, start, end, options)
    if nothing:
        expected[0, 0] = start[-1] * end[-1]
    ours = qa.best(TEXT, spans, logits, null, options)
    assert {(each["start"], each["end"]) for each in ours} == set(expected)
    assert all(np.isclose(each["score"], expected[each["start"], each["end"]]) for each in ours)
    assert [each["score"] for each in ours] == sorted((each["score"] for each in ours), reverse=True)
    assert all(TEXT[each["start"] : each["end"]] == each["answer"] for each in ours)
    few = qa.best(TEXT, spans, logits, null, qa.QuestionAnsweringOptions(**{**vars(options), "top_k": 3}))
    assert few == ours[:3]


def test_equal_answers_stay_in_the_order_of_the_text():
    spans = [(0, 1), (2, 3), (4, 5)]
    ours = qa.best("a b c", spans, np.zeros((2, 3)), [0.0, 0.0], qa.QuestionAnsweringOptions(top_k=9, max_answer_len=1))
    assert [each["answer"] for each in ours] == ["a", "b", "c", ""]


def test_marks_belong_to_their_letters():
    text = "cafe\u0301s \u0939\u093f\u0928\u094d\u0926\u0940."
    begins, ends = qa.edges(text, words=True)
    assert text[begins[3] : ends[2]] == "cafe\u0301s"
    assert text[begins[9] : ends[9]] == "\u0939\u093f\u0928\u094d\u0926\u0940"
