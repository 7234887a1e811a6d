"""The frameworks that the tests run on: `MISTRAL_TEST_BACKENDS=torch,flax` limits them."""

from __future__ import annotations

import itertools
import os

import pytest

PACKAGES = {"torch": "torch", "flax": "flax", "tf": "tensorflow"}
"""Backend -> the package that it needs."""
METHODS = {"mistral_torch": "forward", "mistral_flax": "__call__", "mistral_tf": "call"}
"""The method of a module that computes."""
REQUESTED = tuple(os.environ.get("MISTRAL_TEST_BACKENDS", ",".join(PACKAGES)).split(","))


def leave_further(items, *, of_whole_files=True):
    """Of a product that PyTorch has whole, the other frameworks have what `others` names; the rest is `slow`.

    Raises UsageError where it names a value that no test of a whole file has.
    """
    marked = (item for item in items if item.get_closest_marker("others"))
    for function, points in itertools.groupby(marked, key=lambda item: item.nodeid.partition("[")[0]):
        points = list(points)
        for name, stand in points[0].get_closest_marker("others").kwargs.items():
            if of_whole_files and not {*stand} <= {point.callspec.params[name] for point in points}:
                raise pytest.UsageError(f"{function}: not all of {stand} are values of {name}")
            for point in points:
                if point.callspec.params["backend"] != "torch" and point.callspec.params[name] not in stand:
                    point.add_marker(pytest.mark.slow)
