"""How `make test` shares tests out between processes."""

from __future__ import annotations

import pytest


def test_the_tests_of_a_file_are_a_group(request):
    """A pytest whose tests pytest-xdist cannot name forms none, in silence, and each process compiles everything."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("tests are not shared out by groups here")
    assert request.node.nodeid.endswith("@tests/test_sharing.py")
