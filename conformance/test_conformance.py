"""The suite under pytest: one test for each check of each backend, attention implementation and dtype."""

from __future__ import annotations

import pytest

from . import suite

SUBJECTS = (
    ("torch", "eager"),
    ("torch", "sdpa"),
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
        if dtype in check.dtypes
    ],
)
def test_conformance(subject, dtype, check):
    found = list(check.run(suite.subject(*subject, dtype)))
    assert found, "the check compared nothing"
    assert not [item for item in found if not item.passed], "\n".join(str(i) for i in found if not i.passed)
