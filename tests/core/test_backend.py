"""Which backend is meant follows from what is given; else it is the first that is installed, said once."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mistral_core import backend as backends
from mistral_core.errors import InputError, MissingExtraError


@pytest.mark.parametrize(
    ("name", "expected"),
    [("torch", "torch"), ("pt", "torch"), ("jax", "flax"), ("flax", "flax"), ("tf", "tf"), ("tensorflow", "tf")],
)
def test_names_and_aliases(name, expected):
    assert backends.chosen(name) == backends.chosen(framework=name) == expected


def test_two_that_disagree():
    assert backends.chosen("torch", framework="pt") == "torch"
    with pytest.raises(InputError, match="two"):
        backends.chosen("torch", framework="tf")
    with pytest.raises(InputError, match="backend"):
        backends.chosen(3)


def test_an_unknown_one_names_the_nearest():
    with pytest.raises(MissingExtraError, match="did you mean 'torch'"):
        backends.get("torhc")


def test_dtypes_devices_arrays_and_models_tell(backend):
    import importlib

    package = {"mistral_torch": "torch", "mistral_flax": "jax.numpy", "mistral_tf": "tensorflow"}[backend.__name__]
    own = backend.__name__.removeprefix("mistral_")
    dtype = importlib.import_module(package).bfloat16
    assert backends.chosen(given=[None, "cpu", 0, dtype]) == own
    assert backends.chosen(given=[{"": dtype}]) == own
    assert backends.chosen(model=object.__new__(backend.MistralModel)) == own
    assert backends.owner(type("Own", (backend.MistralModel,), {})) == own


def test_what_any_of_them_takes_tells_nothing():
    given = (None, "bfloat16", "cuda:0", 0, np.float32, np.dtype("float32"), np.zeros(3), {"": 0}, float)
    assert [backends.owner(each) for each in given] == [None] * len(given)


def test_those_of_two_frameworks_are_refused():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    with pytest.raises(InputError, match="flax and torch"):
        backends.chosen(given=[torch.float32, jnp.float32])
    assert backends.chosen("tf", given=[torch.float32]) == "tf"


def test_the_first_installed_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "installed", lambda: iter(["flax", "tf"]))
    monkeypatch.setattr(backends, "_SAID", set())
    with caplog.at_level(logging.WARNING, logger="mistral"):
        assert [backends.chosen(), backends.chosen()] == ["flax", "flax"]
    assert [record.getMessage() for record in caplog.records] == [
        "backend: flax, the first that is installed of torch, flax, tf; `backend` chooses another"
    ]
    monkeypatch.setattr(backends, "installed", lambda: iter(()))
    with pytest.raises(MissingExtraError, match="mistral-frameworks"):
        backends.chosen()


def test_the_order_is_torch_flax_tf():
    assert backends.names()[:3] == ["torch", "flax", "tf"]
