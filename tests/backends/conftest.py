"""TensorFlow's decode steps are traced in these tests, and not compiled by XLA, which takes twice as long again.

They are about what happens around a step; conformance and the command line run it as users do.
"""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def without_xla(monkeypatch):
    """Small steps as those of a model on an accelerator, as soon as the package is there."""
    if "mistral_tf.generate" in sys.modules:
        monkeypatch.setattr("mistral_tf.generate._is_float32_on_cpu", lambda model: False)


@pytest.fixture(scope="module")
def asked_for(request):
    """Of a table of cases those that a selected test of the module has: a process that finds out all at once."""
    selected = [item.callspec.params.values() for item in request.session.items
                if item.path == request.path and hasattr(item, "callspec")]  # fmt: skip
    return lambda cases: {name: case for name, case in cases.items() if any(name in each for each in selected)}
