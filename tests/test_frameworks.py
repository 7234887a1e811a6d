"""What `others` leaves to the default run: PyTorch's whole product, and of the other frameworks what it names."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from frameworks import leave_further


def collected(function, **others):
    """A test of two parameters in two frameworks, as pytest collects it."""
    for backend, size, kind in itertools.product(("torch", "flax"), (1, 2), ("a", "b")):
        marks = []
        yield SimpleNamespace(
            nodeid=f"file.py::{function}[{backend}-{size}-{kind}]",
            callspec=SimpleNamespace(params={"backend": backend, "size": size, "kind": kind}),
            get_closest_marker=lambda name: SimpleNamespace(kwargs=others) if others else None,
            add_marker=marks.append,
            marks=marks,
        )


def left(items):
    """What is not slow."""
    return [item.nodeid.partition("[")[2][:-1] for item in items if pytest.mark.slow not in item.marks]


def test_others_have_what_is_named_and_pytorch_all():
    one, some = list(collected("one", size=(2,), kind=("a",))), list(collected("some", kind=("b",)))
    all_ = list(collected("all"))
    leave_further([*one, *some, *all_])
    whole = ["torch-1-a", "torch-1-b", "torch-2-a", "torch-2-b"]
    assert left(one) == [*whole, "flax-2-a"]
    assert left(some) == [*whole, "flax-1-b", "flax-2-b"]
    assert len(left(all_)) == 8


def test_a_value_that_no_test_has_is_an_error():
    items = list(collected("one", kind=("a", "c")))
    with pytest.raises(pytest.UsageError, match=r"file.py::one: not all of \('a', 'c'\) are values of kind"):
        leave_further(items)
    leave_further(items[:3], of_whole_files=False)  # of tests that were named one by one, some values are not there
