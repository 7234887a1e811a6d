"""Conversation: what a turn reads again, what it keeps of an answer, and what it leaves as it was."""

from __future__ import annotations

import numpy as np
import pytest
from scripted import END, FIRST, SECOND, TH, Characters, Model

from mistral_core.errors import EmptyInputError, GenerationConfigError, InputError, SequenceTooLongError, TemplateError
from mistral_core.pipelines.conversation import Conversation

ids = Characters().encode


def answer(text):
    return [*ids(text, False), END]


def conversation(says=(), *, config=None, system="first", **options):
    return Conversation(Model(says, **(config or {})), Characters(system), **{"max_new_tokens": 8, **options})


def say(talk, text, **options):
    """The answer; what was read is what the stats say."""
    return measured(talk, lambda: talk.say(text, **options))


def measured(talk, ask):
    before = len(talk.model.read)
    text = ask()
    turn = talk.last
    assert len(talk.model.read) - before == turn.prompt_tokens - turn.reused + turn.new_tokens - 1
    return text


@pytest.mark.parametrize("plain", [False, True])
def test_three_turns_read_no_token_twice(plain):
    talk = conversation(answer("one") + answer("two") + answer("six"), plain=plain)
    assert [say(talk, text) for text in ("a", "bc", "d")] == ["one", "two", "six"]
    everything = ids("aonebctwodsix") if plain else [1, *ids("<a>", False), *answer("one"), *ids("<bc>", False)]
    if not plain:
        everything += [*answer("two"), *ids("<d>", False), *answer("six")]
        assert talk.model.read == everything[:-1]  # each once, in their order; nobody has read the last one yet
    else:  # a plain text goes on after the end that the model set, which is taken out
        assert [each for each in talk.model.read if each != END] == everything
    assert [each["role"] for each in talk.messages] == ["user", "assistant"] * 3


def test_an_answer_keeps_the_ids_it_was_generated_as():
    talk = conversation([TH, *answer("e"), *answer("x")])
    assert say(talk, "a") == "the"
    assert Characters().encode("the", False) != [TH, *ids("e", False)]
    say(talk, "b")
    assert talk.last.reused == len([1, *ids("<a>", False), TH, *ids("e", False)])
    assert talk.model.read.count(TH) == 1
    assert talk.last.note == ""


def test_an_answer_that_was_edited_is_read_anew():
    talk = conversation([TH, *answer("e"), *answer("x")])
    say(talk, "a")
    talk.messages[1]["content"] = "thy"
    say(talk, "b")
    assert talk.last.reused == len([1, *ids("<a>", False)])
    assert talk.model.read[-8:] == [*answer("thy"), *ids("<b>x", False)]
    assert talk.last.note == "2 tokens were taken back"


def test_the_space_before_an_answer_is_text_where_a_text_goes_on():
    assert say(conversation(answer(" hi")), "a") == "hi"
    assert say(conversation(answer(" hi"), plain=True), "a") == " hi"


def test_a_cut_answer_is_ended_by_the_template():
    talk = conversation(ids("abcdefgh", False) + answer("x"))
    assert say(talk, "a") == "abcdefgh"
    assert talk.last.ended == "length"
    say(talk, "b")
    assert talk.model.read == [1, *ids("<a>", False), *answer("abcdefgh"), *ids("<b>", False), *ids("x", False)]


def test_stop_keeps_what_came_and_its_cache():
    talk = conversation(ids("abcdefgh", False))
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            talk.stop()

    assert say(talk, "a", on_text=stop) == "abc"
    assert talk.last.ended == "stopped"
    assert talk.messages[-1]["content"] == "abc"
    talk.model.says = answer("x")
    assert say(talk, "b") == "x"
    assert talk.model.read == [1, *ids("<a>", False), *answer("abc"), *ids("<b>", False), *ids("x", False)]


def test_a_stop_string_is_neither_in_the_text_nor_in_the_next_prompt():
    talk = conversation(ids("ab##", False) + answer("x"), stop_strings="##")
    pieces = []
    assert say(talk, "a", on_text=pieces.append) == "ab"
    assert "".join(pieces) == "ab"
    assert talk.last.ended == "stop"
    say(talk, "b")
    assert talk.last.reused == len([1, *ids("<a>ab", False)])
    assert talk.model.asked[-1].stops == ("##",)


def test_no_half_character_is_shown_or_kept():
    talk = conversation([FIRST, SECOND, *ids("b", False), FIRST], max_new_tokens=4)
    pieces = []
    assert say(talk, "a", on_text=pieces.append) == "\u00e9b"
    assert "".join(pieces) == "\u00e9b"
    talk.model.says = answer("x")
    say(talk, "b")
    assert talk.model.read.count(FIRST) == 1  # the half one was never read, and no longer belongs to the answer
    assert talk.last.note == ""


def test_an_answer_without_text_leaves_the_messages_as_they_were():
    talk = conversation([END])
    assert say(talk, "a") == ""
    assert talk.messages == []


def test_an_error_leaves_the_conversation_as_it_was():
    talk = conversation(answer("x") + answer("y"))
    say(talk, "a")
    before = list(talk.messages)
    with pytest.raises(TemplateError):
        talk.say("")
    assert talk.messages == before

    def interrupt(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("b", on_text=interrupt)
    assert talk.messages == before
    talk.model.says = answer("z")
    assert say(talk, "b") == "z"
    assert talk.last.reused == len([1, *ids("<a>x", False)])


def test_a_system_prompt_that_moves_to_the_last_message_costs_what_follows_its_old_place():
    talk = conversation(answer("one") + answer("two"), system="last", messages=[{"role": "system", "content": "S"}])
    say(talk, "a")
    assert say(talk, "b") == "two"
    assert talk.last.reused == len([1, *ids("<", False)])
    assert "taken back" in talk.last.note
    prompt = [1, *ids("<a>", False), *answer("one"), *ids("<Sb>", False)]
    assert talk.model.read[-len(prompt) - 1 :] == prompt[2:] + ids("two", False)


def test_regenerate_answers_the_last_text_again():
    talk = conversation(answer("one") + answer("two") + answer("six"))
    with pytest.raises(EmptyInputError):
        talk.regenerate()
    say(talk, "a")
    say(talk, "b")
    assert measured(talk, talk.regenerate) == "six"
    assert [each["content"] for each in talk.messages] == ["a", "one", "b", "six"]
    assert talk.last.prompt_tokens - talk.last.reused == 1  # the logits after the prompt are not kept
    assert talk.model.read[-4:] == ids(">six", False)


def test_reset_keeps_the_system_prompt_and_its_tokens():
    talk = conversation(answer("one") + answer("two"), messages=[{"role": "system", "content": "S"}])
    say(talk, "a")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "S"}]
    say(talk, "b")
    assert talk.last.reused == len([1, *ids("<S", False)])
    talk.system = None
    assert talk.messages[0]["role"] == "user"


def test_a_rolling_cache_that_cannot_go_back_is_computed_anew_and_says_so():
    long = ids("z" * 100, False)
    talk = conversation(long + answer("x"), config={"sliding_window": 5}, max_new_tokens=100)
    say(talk, "a")
    talk.reset()
    say(talk, "a")
    assert talk.last.reused == 0
    assert "rolls" in talk.last.note


def test_a_full_context_is_an_error_that_says_what_to_do():
    talk = conversation(answer("x" * 30), config={"max_position_embeddings": 40}, max_new_tokens=100)
    say(talk, "a" * 10)
    assert talk.last.ended == "length"
    with pytest.raises(SequenceTooLongError, match="reset"):
        talk.say("b")
    assert len(talk.messages) == 2


def test_the_oldest_turns_are_forgotten_where_that_was_asked_for():
    says = [token for text in ("one", "two", "six", "ten") for token in answer(text)]
    system = [{"role": "system", "content": "S"}]
    talk = conversation(says, config={"max_position_embeddings": 40}, forget=True, messages=system)
    for text in ("a" * 7, "b" * 5, "c" * 5):
        say(talk, text)
    assert talk.last.forgotten == 2
    assert [each["content"] for each in talk.messages] == ["S", "b" * 5, "two", "c" * 5, "six"]
    assert say(talk, "d") == "ten"
    with pytest.raises(SequenceTooLongError):
        talk.say("e" * 50)


def test_each_answer_has_a_seed_of_its_own():
    talk = conversation(answer("x") + answer("y") + answer("z"), seed=7, do_sample=True)
    say(talk, "a")
    measured(talk, talk.regenerate)
    say(talk, "b")
    assert [each.seed for each in talk.model.asked] == [7, 8, 9]


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"temperatur": 1}, {"top_p": 2.0}, {"max_new_tokens": -1}])
def test_options_are_checked_at_once(options):
    with pytest.raises(GenerationConfigError):
        conversation(**options)


@pytest.mark.parametrize(
    "messages", [["a"], [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}]]
)
def test_messages_that_no_turn_can_follow_are_not_loaded(messages):
    talk = conversation(answer("x"))
    say(talk, "a")
    with pytest.raises((InputError, TemplateError)):
        talk.load(messages)
    assert len(talk.messages) == 2


def test_a_plain_text_has_no_system_prompt():
    with pytest.raises(InputError, match="template"):
        conversation(plain=True).system = "S"


@pytest.mark.parametrize("window", [None, 5])
def test_whatever_is_done_answers_are_those_of_the_whole_conversation_computed_anew(window):
    random = np.random.default_rng(3)
    talk = conversation(config={"sliding_window": window}, system="last", stop_strings=["q"], max_new_tokens=6)
    for step in range(16):
        choice = random.integers(8) if talk.messages[1:] else 7
        if choice == 0:
            talk.reset()
        elif choice == 1:
            talk.system = None if talk.system else "be"
        elif choice == 2:
            talk.messages[-1] = {"role": "assistant", "content": "no"}
        again = choice == 3 and any(each["role"] == "user" for each in talk.messages)
        before = len(talk.model.read)
        text = talk.regenerate() if again else talk.say("abcdefg"[: 1 + step % 7])
        turn = talk.last
        assert len(talk.model.read) - before == turn.prompt_tokens - turn.reused + turn.new_tokens - 1
        fresh = conversation(config={"sliding_window": window}, stop_strings=["q"], max_new_tokens=6, plain=True)
        fresh.format = Given(talk._seen[: turn.prompt_tokens])
        assert fresh.say("") == text


class Given:
    """A format whose prompt is these ids."""

    def __init__(self, given):
        self.given = given

    def prompt(self, messages):
        return self.given

    answered = prompt

    def context(self, ids):
        return []
