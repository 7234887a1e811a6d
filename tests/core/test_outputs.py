"""Outputs: a name for each field, and a tuple of those that are there."""

from __future__ import annotations

import copy
import pickle

import pytest

from mistral_core import outputs
from mistral_core.outputs import CausalLMOutput, GenerateOutput, ModelOutput, QuestionAnsweringOutput

WITHOUT = CausalLMOutput(None, "logits", attentions=("a", "b"))
WITH = CausalLMOutput("loss", "logits", "cache")


def test_index_slice_len_and_iteration_see_what_is_there():
    assert (WITHOUT[0], WITHOUT[1], WITHOUT[-1], len(WITHOUT)) == ("logits", ("a", "b"), ("a", "b"), 2)
    assert WITH[:2] == ("loss", "logits")
    assert type(WITH[:2]) is tuple
    loss, *rest = WITH
    assert (loss, rest) == ("loss", ["logits", "cache"])
    assert tuple(WITHOUT) == WITHOUT.to_tuple() == ("logits", ("a", "b"))
    with pytest.raises(IndexError):
        WITHOUT[2]


def test_names_always_answer():
    assert (WITHOUT.loss, WITHOUT["loss"], WITHOUT.logits, WITHOUT["logits"]) == (None, None, "logits", "logits")
    assert ("loss" in WITHOUT, "loss" in WITH, "logits" in WITHOUT) == (False, True, True)
    assert (WITHOUT.get("loss"), WITHOUT.get("loss", 7), WITHOUT.get("logits", 7)) == (None, 7, "logits")
    assert list(WITHOUT.items()) == [("logits", "logits"), ("attentions", ("a", "b"))]
    assert dict(WITH.items()) == {**WITH} == WITH._asdict()
    assert list(WITH.values()) == list(WITH)
    with pytest.raises(AttributeError, match="CausalLMOutput has no field 'los'; it has loss, logits, "):
        _ = WITH.los
    with pytest.raises(KeyError, match="CausalLMOutput has no field 'los'; it has loss, logits, "):
        WITH["los"]


def test_an_output_is_a_named_tuple_of_what_is_there():
    kind = type(WITHOUT)
    assert isinstance(WITHOUT, CausalLMOutput)
    assert isinstance(WITHOUT, tuple)
    assert kind._fields == ("logits", "attentions")
    assert kind is type(CausalLMOutput(logits=1, attentions=2))
    assert kind(1, 2) == kind._make([1, 2]) == kind(each for each in (1, 2)) == (1, 2)
    assert kind(None, None) == (None, None)  # what libraries put into places, whatever it is
    assert str(WITHOUT) == "CausalLMOutput(logits='logits', attentions=('a', 'b'))"
    with pytest.raises(AttributeError):
        WITHOUT.loss = 1


def test_fields_are_replaced_by_name():
    assert WITHOUT._replace(loss="loss", attentions=None) == CausalLMOutput("loss", "logits")
    assert WITHOUT._replace(loss="loss")._fields == ("loss", "logits", "attentions")
    with pytest.raises(TypeError, match="must be given each of"):
        CausalLMOutput("loss", loss="loss")
    with pytest.raises(TypeError, match="last_hidden_state, past_key_values, hidden_states, attentions"):
        ModelOutput(logits=1)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output))])
def test_copies(again):
    for output in (WITH, WITHOUT, QuestionAnsweringOutput(end_logits=1), GenerateOutput([1], attention_mask=[2])):
        assert again(output) == output
        assert type(again(output)) is type(output)


def test_every_class_names_all_its_fields():
    classes = outputs.Output.__subclasses__()
    assert {each.__name__ for each in classes} >= {"ModelOutput", "CausalLMOutput", "GenerateOutput"}
    for each in classes:
        assert each._fields[-1] in ("attentions", "attention_mask")
        assert tuple(each(*range(len(each._fields)))) == tuple(range(len(each._fields)))
