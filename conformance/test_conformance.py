"""The suite under pytest: one test for each check of each backend, attention implementation and dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mistral_core.reference import cache, quantized

from . import adapters, suite
from .cases import CAUSAL, HEADS, INT8, INT8_MARGIN, LONG, PACKED, ROUNDED_MARGIN
from .compare import compare
from .pieces import by_name, expected_int8, expected_rounded
from .tolerances import MODEL, Tolerance

SUBJECTS = (
    ("torch", "eager"),
    ("torch", "sdpa"),
    ("torch", "blocked"),
    ("torch", "flex"),
    ("flax", "eager"),
    ("flax", "dot_product"),
    ("flax", "blocked"),
    ("tf", "eager"),
    ("tf", "sdpa"),
    ("tf", "blocked"),
)
REPRESENTATIVES = {
    "whole": (
        "window",
        "window-none",
        "window-1",
        "layer-types",
        "multi-query",
        "three-groups",
        "tied",
        "rope-yarn",
        "query-scale",
        "left-padding",
        "holes",
        "all-padding",
        "documents",
        "begin-again",
        "far-positions",
        "embeddings",
        "sequence",
        "token",
        "question",
        "long",
    ),
    "cached": (
        "window 7+1+3+6",
        "window by ones",
        "window-none 7+1+3+6",
        "layer-types 7+1+3+6",
        "layer-types by ones",
        "left-padding 7+1+3+6",
    ),
    "prompt": (f"of {suite.WINDOW + 1}", f"of {2 * suite.WINDOW}"),
    "rollback": ("of 2",),
    "gradients": ("window", "multi-query", "left-padding", "all-padding", "long"),
    "packed": ("int8 row", "int4 32", "int4 asymmetric", "nf4 64", "fp8 block", "tied"),
    "packed-cached": ("int4 32",),
    "packed-greedy": ("int4 32",),
    "packed-sampled": (),
}
"""By kind of check: the cases that the default run has of further implementations, of bfloat16 and of packed matrices.

Each is there for a property that these can break by themselves: a window, none, one for each layer, rows that begin
late or see nothing, shared keys, one new token and several at a time, and of another precision each place that rounds.
What any other case adds lies outside the attention, and is proved by eager float32. Of packed matrices there is each
kind, scales of rows, groups and blocks, and zero points; that any size of a group will do is a matter of one product.
"""

CUTS = ("7+1+3+6", "by ones", "17")
"""How the text of a cached case is cut into calls."""

EVERY_CUT = ("window", "window-none", "window-1", "window-at-length", "window-beyond-length", "layer-types",
             "query-scale", "left-padding", "right-padding", "holes", "all-padding", "int8")  # fmt: skip
"""The cases of which the default run has every cut: what is kept, seen or counted of earlier calls is another there.

What any call computes alike, the first cut shows, which has a call of one token and calls of several.
"""

FURTHER = {
    "whole": tuple(
        case
        for case in REPRESENTATIVES["whole"]
        if case not in ("tied", "rope-yarn", "query-scale", "embeddings", "sequence", "token", "question")
    ),
}
"""Of these, the cases that further implementations have: all but what is computed before attention and after it."""

WITHOUT_GREEDY = ("flex", "blocked")
"""Further implementations whose texts from `generate` are not in the default run.

What they see of a cache is in the cached cases, and that `generate` asks any implementation alike is in those of `sdpa`
and `dot_product`.
"""

FURTHER_IN_BFLOAT16 = {
    "whole": (
        "window",
        "window-none",
        "layer-types",
        "multi-query",
        "left-padding",
        "all-padding",
        "documents",
        "long",
    ),
    "cached": ("window by ones",),
    "prompt": (),
    "rollback": (),
}
"""Of these, the cases that further implementations have in bfloat16: what their attention rounds, of each kind of text.

That any other case meets them is proved by float32, and that it rounds no more than it may by eager bfloat16.
"""

PACKED_IN_BFLOAT16 = ("packed int4 32", "packed nf4 64", "packed-product")
"""And of packed matrices in bfloat16: a head of another kind and one of floats, and products alone."""


def marks(subject, dtype, check):
    """The marks of a point: one process for what compiles the same, and `slow` where a representative stands for it."""
    # torch compiles nothing here, so that its points can go where there is time
    together = pytest.mark.xdist_group("-".join(subject) if subject[0] == "torch" else subject[0])
    kind, _, case = check.name.partition(" ")
    first = subject[1] == "eager" and dtype == "float32" and not kind.startswith("packed")
    if kind.startswith("packed") and dtype != "float32":
        return together if check.name in PACKED_IN_BFLOAT16 else (together, pytest.mark.slow)
    if kind == "cached" and not case.startswith(tuple(f"{name} " for name in EVERY_CUT)) and not case.endswith(CUTS[0]):
        return together, pytest.mark.slow
    if kind == "greedy" and subject[1] in WITHOUT_GREEDY:
        return together, pytest.mark.slow
    stand = dict(REPRESENTATIVES)
    if subject[1] != "eager":
        stand |= FURTHER if dtype == "float32" else FURTHER_IN_BFLOAT16
    stays = first or any(f"{case} ".startswith(f"{each} ") for each in stand.get(kind, (case,)))
    return together if stays else (together, pytest.mark.slow)


def test_every_representative_is_a_case():
    assert set(PACKED_IN_BFLOAT16) <= set(suite.CHECKS)
    assert all(f"cached {name} {cut}" in suite.CHECKS for name in EVERY_CUT for cut in CUTS)
    for of_further in (FURTHER, FURTHER_IN_BFLOAT16):
        assert all({*names} <= {*REPRESENTATIVES[kind]} for kind, names in of_further.items())
    assert {*WITHOUT_GREEDY} < {implementation for _, implementation in SUBJECTS}
    for kind, names in REPRESENTATIVES.items():
        assert all(any(f"{check} ".startswith(f"{kind} {name} ") for check in suite.CHECKS) for name in names)


@pytest.mark.xdist_group("tf")
def test_every_implementation_is_a_subject():
    found = {(s.adapter.name, s.implementation) for s in suite.subjects(dtypes=("float32",))}
    assert found == set(SUBJECTS)


@pytest.mark.parametrize(
    ("subject", "dtype", "check"),
    [
        pytest.param(*point, id=f"{'-'.join(point[0])}-{point[1]}-{point[2].name}", marks=marks(*point))
        for point in itertools.product(SUBJECTS, suite.DTYPES, suite.CHECKS.values())
        if point[2].suits(point[0][1], point[1])
    ],
)
def test_conformance(subject, dtype, check):
    found = check.run(suite.subject(*subject, dtype))
    assert found, "the check compared nothing"
    assert not [item for item in found if not item.passed], "\n".join(str(i) for i in found if not i.passed)


@pytest.mark.xdist_group("torch-eager")
@pytest.mark.parametrize(
    "check", ["modules window", "adapters", "gradients of adapters", "packed-rounded", "greedy", "greedy in C"]
)
def test_a_check_that_changes_a_model_has_its_own(check):
    subject = suite.Subject(adapters.get("torch"), "eager", "float32")
    assert suite.CHECKS[check].run(subject)
    assert not subject.models


@pytest.mark.xdist_group("torch-eager")
def test_no_check_changes_a_model_that_others_call():
    subject = suite.subject("torch", "eager", "float32")  # in a whole run it has run all checks
    for check in ("parts window", "chunked window", "cached window 7+1+3+6", "sampled", "packed int4 32"):
        assert suite.CHECKS[check].run(subject)
    for case in (*CAUSAL, *HEADS, LONG, *PACKED):
        found, made = subject.model(case), subject.own_model(case)
        assert [(name, type(part)) for name, part in found.named_modules()] == [
            (name, type(part)) for name, part in made.named_modules()
        ]
        for (name, array), (other, wanted) in zip(found.named_arrays(), made.named_arrays(), strict=True):
            assert name == other
            assert array.tobytes() == wanted.tobytes(), name


def test_no_code_of_the_int8_text_lies_near_another(monkeypatch):
    margins: list[float] = []

    def measured(x):
        codes, scale = int8_codes(x)
        margins.append((0.5 - np.abs(x / scale[..., None] - codes))[INT8.mask != 0].min())
        return codes, scale

    int8_codes = cache.int8_codes
    monkeypatch.setattr(cache, "int8_codes", measured)
    expected_int8.__wrapped__(True)
    assert len(margins) == 2 * INT8.config.num_hidden_layers
    assert min(margins) > INT8_MARGIN


def test_no_rounded_row_lies_near_another(monkeypatch):
    margins: list[float] = []

    def measured(x):
        taken = rounded_rows(x)
        for start in range(0, x.shape[-1], quantized.ROUNDED_COLUMNS):
            given, found = (each[..., start : start + quantized.ROUNDED_COLUMNS] for each in (x, taken))
            scale = np.abs(found).max(axis=-1, keepdims=True) / 127  # the largest number has code 127
            margins.append((0.5 - np.abs(given - found) / scale).min())
        return taken

    rounded_rows = quantized.rounded_rows
    monkeypatch.setattr(quantized, "rounded_rows", measured)
    expected_rounded.__wrapped__()
    assert len(margins) > 7
    assert min(margins) > ROUNDED_MARGIN


@pytest.mark.xdist_group("tf")
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
