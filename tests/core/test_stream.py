"""Text as it comes: what ends it, what is held back, and transformers' streamers."""

from __future__ import annotations

import queue
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import InputError
from mistral_core.text.stream import StoppingStream, TextIteratorStreamer, TextStream, TextStreamer, beginning, telling
from mistral_core.text.tokenizer import MistralTokenizer

TOKENIZER = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)


class Bytes:
    """A tokenizer whose ids are bytes, so that characters and stop strings come in pieces."""

    def decode(self, ids, *, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer whose ids are texts."""

    def __init__(self, *words):
        self.words = words

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids)


def pieces(tokenizer, ids, stops=()):
    stream = StoppingStream(tokenizer, stops)
    found = []
    for each in ids:
        found.append(stream.push(each))
        if stream.stopped:
            return found, True
    return [*found, stream.end()], stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["o"], ""),  # the first character of all
        ("one two three", ["three"], "one two "),  # the last
        ("one two three", ["four"], "one two three"),
        ("ababac", ["abac"], "ab"),  # a beginning of it inside itself
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcd", "bc"], "a"),  # the end that comes first
        ("abcd", ["abcd", "c"], "ab"),  # though it begins later
        ("abcd", ["bc", "abc"], ""),  # two that end together: nothing of the longer one
        ("größe", ["ö"], "gr"),  # of two bytes
        ("a\U0001f600b", ["\U0001f600b"], "a"),
        ("x", ["xy"], "x"),  # what might have become one
    ],
)
def test_text_ends_before_what_ends_it(text, stops, wanted):  # 111
    found, stopped = pieces(Bytes(), text.encode(), stops)
    assert "".join(found) == wanted
    assert stopped == (wanted != text)


def test_a_stop_string_across_tokens_and_inside_one():
    words = Words("Hel", "lo wo", "rld", ". An", "d more")
    assert pieces(words, range(5), ["world"]) == (["Hel", "lo ", ""], True)
    assert pieces(words, range(5), ["ld. A"]) == (["He", "llo wo", "r", ""], True)  # the first l might have begun it
    assert pieces(words, range(5), ["o w"]) == (["Hel", "l"], True)


def test_a_stop_string_before_half_a_character_is_seen_at_once():
    stream = StoppingStream(Words("a\n\ufffd", "b"), ["\n"])
    assert stream.push(0) == "a"
    assert stream.stopped


def test_what_was_there_before_does_not_end_it():
    stream = StoppingStream(Bytes(), ["ab"], after=b"xa")
    assert "".join(stream.push(each) for each in b"bc") + stream.end() == "bc"


@given(
    st.text(alphabet="ab\u00e9\U0001f600", max_size=12),
    st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=3), max_size=3),
)
def test_any_text_and_stops(text, stops):
    found, stopped = pieces(Bytes(), text.encode(), stops)
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert "".join(found) == (text[: ends[0][1]] if ends else text)
    assert stopped == bool(ends)


@given(st.lists(st.integers(0, 255), max_size=24))
def test_any_bytes_come_out_as_they_are_together(ids):
    stream = TextStream(Bytes())
    found = [*(stream.push(each) for each in ids), stream.end()]
    assert "".join(found) == Bytes().decode(ids)


# transformers' streamers


def told(streamer, text, *, prompt="Emma"):
    ids = TOKENIZER.encode(text)
    given = TOKENIZER.encode(prompt)
    streamer.put(np.array([given]))
    for each in ids[len(given) :]:
        streamer.put(np.array([each]))
    streamer.end()


def test_a_text_streamer_prints(capsys):
    text = "Emma was not at all pleased"
    streamer = TextStreamer(TOKENIZER)
    told(streamer, text)
    told(streamer, text)  # once more
    assert capsys.readouterr().out == f"{text}\n{text}\n"
    told(TextStreamer(TOKENIZER, skip_prompt=True, stop_strings=["all"]), text)
    assert capsys.readouterr().out == " was not at \n"


def test_a_text_streamer_shows_one_row():
    with pytest.raises(ValueError, match="2 rows"):
        TextStreamer(TOKENIZER).put(np.ones((2, 3), int))


def test_an_iterator_in_another_thread():
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=600)
    thread = threading.Thread(target=told, args=(streamer, "Emma was pleased"))
    thread.start()
    assert "".join(streamer) == " was pleased"
    thread.join()
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(TOKENIZER, timeout=0.01))


def failing(streamer, *, after):
    """A call that fails before it tells anything, or after so many tokens."""
    try:
        with beginning(streamer):
            if after is None:
                raise InputError("no")
        with telling(streamer):
            ids = TOKENIZER.encode("Emma was pleased")
            streamer.put(np.array([ids[:1]]))
            for each in ids[1 : 1 + after]:
                streamer.put(np.array([each]))
            raise InputError("no")
    except InputError:
        pass


@pytest.mark.parametrize("after", [None, 0, 2])
def test_an_iteration_ends_with_the_error(after):
    streamer = TextIteratorStreamer(TOKENIZER, timeout=600)
    for _ in range(2):  # and again
        thread = threading.Thread(target=failing, args=(streamer,), kwargs={"after": after})
        thread.start()
        list(streamer)
        thread.join()
        assert isinstance(streamer.error, InputError)
    told(streamer, "Emma was")
    assert "".join(streamer) == "Emma was"
    assert streamer.error is None


def test_a_streamer_of_another_kind_is_told_the_end_once():
    class Other:
        ended = 0

        def put(self, value):
            pass

        def end(self):
            self.ended += 1

    for after in (None, 2):
        failing(other := Other(), after=after)
        assert other.ended == 1


def test_a_loop_that_was_left_does_not_go_on_with_another_call():
    streamer = TextIteratorStreamer(TOKENIZER, timeout=600)
    told(streamer, "Emma was not at all pleased")
    for piece in streamer:
        assert piece
        break
    told(streamer, "Emma came")
    assert "".join(streamer) == "Emma came"
    told(streamer, "Emma was pleased")  # a look at the first piece, and the rest
    first = next(streamer)
    assert first + "".join(streamer) == "Emma was pleased"
    told(streamer, "Emma was pleased")
    first = next(iter(streamer))
    assert first + "".join(streamer) == "Emma was pleased"
    told(streamer, "Emma came")  # two calls before the first is read
    told(streamer, "Emma was")
    assert ["".join(streamer), "".join(streamer)] == ["Emma came", "Emma was"]


def test_several_rows_or_two_calls_at_once_are_refused():
    streamer = TextStreamer(TOKENIZER)
    with pytest.raises(InputError, match="2 rows"):
        streamer.put(np.ones((2, 3), int))
    streamer.put(np.array([[5, 6]]))
    with pytest.raises(InputError, match="2 rows"):
        streamer.put(np.array([5, 6]))
    with pytest.raises(InputError, match="before the last one ended"):
        streamer.put(np.array([[5, 6]]))
