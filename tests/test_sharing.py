"""`make test` shares tests out between processes as tests/sharing.py says."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharing import LONGEST


def test_the_tests_of_a_file_are_a_group(request):
    """A pytest whose tests pytest-xdist cannot name forms none, in silence, and each process compiles everything."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("tests are not shared out by groups here")
    assert request.node.nodeid.endswith("@tests/test_sharing.py")


def test_what_takes_longest_is_begun_with(request):
    """Neither pytest, which takes a file once and sorts by fixtures, nor pytest-xdist moves it."""
    folders = [Path(__file__).parents[1] / name for name in ("tests", "conformance")]
    assert {*LONGEST} <= {path.name for folder in folders for path in folder.rglob("test_*.py")}
    if not hasattr(request.config, "workerinput"):
        pytest.skip("tests are not shared out between processes here")
    last = [item.path.name not in LONGEST for item in request.session.items]
    assert last == sorted(last)
