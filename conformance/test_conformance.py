"""The suite under pytest: one test for each check of each backend, attention implementation and dtype."""

from __future__ import annotations

import numpy as np
import pytest

from . import adapters, suite
from .compare import compare
from .pieces import by_name
from .tolerances import MODEL, Tolerance

SUBJECTS = (
    ("torch", "eager"),
    ("torch", "sdpa"),
    ("torch", "flex"),
    ("flax", "eager"),
    ("flax", "dot_product"),
    ("tf", "eager"),
)


def test_every_implementation_is_a_subject():
    found = {(s.adapter.name, s.implementation) for s in suite.subjects(dtypes=("float32",))}
    assert found == set(SUBJECTS)


@pytest.mark.parametrize(
    ("subject", "dtype", "check"),
    [
        pytest.param(subject, dtype, check, id=f"{'-'.join(subject)}-{dtype}-{check.name}")
        for subject in SUBJECTS
        for dtype in suite.DTYPES
        for check in suite.CHECKS.values()
        if check.suits(subject[1], dtype)
    ],
)
def test_conformance(subject, dtype, check):
    found = list(check.run(suite.subject(*subject, dtype)))
    assert found, "the check compared nothing"
    assert not [item for item in found if not item.passed], "\n".join(str(i) for i in found if not i.passed)


@pytest.mark.parametrize(
    "name", ["window", "left-padding", "all-padding", "tied", "documents", "sequence", "token", "question"]
)
def test_gradients_of_the_three_frameworks_agree(name):
    case = by_name(name)
    (_, first), *others = (
        subject.adapter.loss_and_gradients(subject.model(case), subject.inputs(case))
        for subject in (suite.subject(backend, "eager", "float32") for backend in adapters.NAMES)
    )
    largest = max(float(np.abs(gradient).max()) for gradient in first.values())
    for _, gradients in others:
        assert gradients.keys() == first.keys()
        for parameter, gradient in gradients.items():
            # two float32 results, each within the bound of the truth; the gradient of a bias is a sum of terms that
            # cancel out before a softmax, so it is measured against the largest gradient instead of its own
            own = float(np.abs(first[parameter]).max())
            cancels = parameter.endswith(".bias") and own
            bound = Tolerance(2 * MODEL * max(1.0, largest / own) if cancels else 2 * MODEL)
            found = compare(("torch", "eager", "float32"), name, parameter, gradient, first[parameter], bound)
            assert found.passed, str(found)
