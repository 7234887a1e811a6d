"""A pytest plugin for all tests: JAX adds no axes and mixes no dtypes by itself (pyproject.toml, addopts).

Some of its users have it so, and what passes under these switches passes without them. The environment says it, so that
JAX has them whenever a test imports it, in processes that a test starts too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest

SWITCHES = {"JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict"}
"""Variable of the environment -> the value that JAX reads when it is imported."""

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(autouse=True)
def strict_jax(request):
    """The switches; off where a test is marked `lenient_jax`, with a reason that is none of ours."""
    mark = request.node.get_closest_marker("lenient_jax")
    if mark is None or importlib.util.find_spec("jax") is None:
        yield
        return
    (_reason,) = mark.args
    jax = importlib.import_module("jax")  # before the environment changes: JAX reads it once

    environment = request.getfixturevalue("monkeypatch")
    for name in SWITCHES:
        environment.delenv(name, raising=False)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
