"""What clients written for transformers expect of any backend."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import numpy as np
import pytest

from mistral_core.compat.clients import SeenAs, documents_told
from mistral_core.errors import InputError, UnknownArgumentError


class Own(SeenAs):
    """What is seen as another library's class."""

    seen_as = ("a_library_that_is_not_there.Newer", "a_library_that_is_not_there.Theirs")

    def __init__(self):
        self.number = 7


class Derived(Own):
    def __repr__(self):
        return f"{super().__repr__()[:1]}{self.number}"


@pytest.fixture
def theirs(monkeypatch):
    library = types.ModuleType("a_library_that_is_not_there")
    library.Theirs = type("Theirs", (), {"__init_subclass__": None, "theirs": 1})
    del library.Theirs.__init_subclass__
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return library.Theirs


def test_without_the_library_an_object_is_what_it_is():
    assert Derived().__class__ is Derived


def test_with_the_library_it_is_both(theirs):
    own = Derived()
    assert isinstance(own, theirs)
    assert isinstance(own, Own)
    assert type(own) is Derived
    assert own.__class__.__name__ == "Derived"
    assert own.__class__ is Derived().__class__
    assert not hasattr(own, "theirs")
    assert repr(own) == "<7"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_pickled_as_what_it_is(theirs, protocol):
    own = Derived()
    for again in (pickle.loads(pickle.dumps(own, protocol)), copy.copy(own), copy.deepcopy(own)):
        assert type(again) is Derived
        assert again.number == 7


def test_its_class_can_be_assigned(theirs):
    own = Own()
    own.__class__ = Derived
    assert type(own) is Derived


def test_documents_of_packed_rows():
    ends = np.array([0, 2, 5, 6], np.int32)
    told = documents_told({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}, None)
    assert told.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert documents_told({"seq_idx": [[0, 1]]}, None) == [[0, 1]]
    assert documents_told({"cu_seq_lens_q": ends}, "given") == documents_told({"seq_idx": 1}, "given") == "given"
    assert documents_told({"cu_seq_lens_q": None}, None) is None
    assert documents_told({"cache_position": [3], "token_type_ids": [[0]]}, None) is None


def test_an_argument_that_nobody_knows():
    with pytest.raises(UnknownArgumentError, match="did you mean attention_mask"):
        documents_told({"attention_maks": 1}, None)
    with pytest.raises(TypeError, match="head_mask"):
        documents_told({"head_mask": None}, None)
    assert issubclass(UnknownArgumentError, InputError)
