"""The conformance suite on a device that is named, and in float16, which it compares where it is asked to."""

from __future__ import annotations

import numpy as np
import pytest

from conformance import __main__ as command
from conformance import adapters, suite
from conformance.pieces import Subject, by_name, expected
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, UnsupportedFeatureError


def name_of(backend):
    return backend.__name__.removeprefix("mistral_")


def test_torch_puts_models_arrays_and_caches_on_the_device():
    adapter = pytest.importorskip("conformance.adapters.torch").BackendAdapter("mistral_torch", device="meta")
    model = Subject(adapter, "eager", "float32").model(by_name("window"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert adapter.array(np.zeros(2), "bfloat16").is_meta
    assert adapter.array(np.zeros(2, int)).is_meta
    assert all(keys.is_meta for keys in adapter.allocate(TINY, 1, 4, "float32").keys)


def test_jax_binds_models_and_arrays_to_a_device_that_is_not_its_own_choice(monkeypatch):
    flax = pytest.importorskip("conformance.adapters.flax")
    free = flax.BackendAdapter("mistral_flax")
    assert free.device is None
    assert not free.array(np.zeros(2)).committed
    monkeypatch.setattr(flax, "first_device", lambda: "an accelerator")
    bound = flax.BackendAdapter("mistral_flax")
    assert bound.device == flax.jax.devices("cpu")[0]
    assert bound.array(np.zeros(2), "bfloat16").committed
    subject = Subject(bound, "eager", "float32")
    assert all(array.committed for array in subject.model(by_name("window")).params.values())
    for name in ("whole window", "cached window 17", "greedy"):
        assert all(item.passed for item in suite.CHECKS[name].run(subject)), name


def test_a_device_that_is_not_here_is_refused(backend, capsys):
    with pytest.raises((ConfigError, UnsupportedFeatureError), match="device"):
        adapters.get(name_of(backend), device="cuda:99")
    assert command.main(["--backend", name_of(backend), "--device", "cuda:99"]) == 2
    assert "cuda:99" in capsys.readouterr().err


@pytest.mark.parametrize("check", ["functions", "blocks", "whole window", "whole window-1"])
def test_float16_is_compared_where_it_is_asked_for(backend, check):
    adapter = adapters.get(name_of(backend))
    for implementation in adapter.implementations:
        assert suite.CHECKS[check].suits(implementation, "float16")
        found = list(suite.CHECKS[check].run(Subject(adapter, implementation, "float16")))
        assert found
        assert not [str(item) for item in found if not item.passed]


def test_float16_has_a_bound_that_a_wrong_window_breaks():
    case, adapter = by_name("window"), adapters.get("torch")
    subject = Subject(adapter, "eager", "float16")
    narrow = case._replace(config=case.config.replace(sliding_window=case.config.sliding_window - 1))
    models, inputs = (subject.model(case), subject.model(narrow)), subject.inputs(case)
    right, wrong = (adapter.numpy(adapter.call(model, **inputs).logits) for model in models)
    wanted, exact = (expected(case.name, "float16", each).logits for each in (False, True))
    assert subject.compare(case.name, "logits", right, wanted, exact).passed
    assert not subject.compare(case.name, "logits", wrong, wanted, exact).passed
