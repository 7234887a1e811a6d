"""Devices as every framework writes them: what is not here is an error, -1 is the CPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mistral_core import devices
from mistral_core.errors import ConfigError

HERE = {"cpu": ["c0"], "gpu": ["g0", "g1"], "meta": ["m"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (-1, "c0"), ("-1", "c0"), ("cpu", "c0"), ("CPU:0", "c0"), ("/CPU:0", "c0"), (0, "g0"), ("0", "g0"),
        (1, "g1"), (np.int64(1), "g1"), (np.array(0), "g0"), ("cuda", "g0"), ("cuda:1", "g1"), ("gpu:0", "g0"),
        ("GPU", "g0"), ("/GPU:1", "g1"), ("/device:GPU:1", "g1"), ("auto", "g0"), ("rocm:1", "g1"), ("meta", "m"),
        ("/job:localhost/replica:0/task:0/device:GPU:1", "g1"), (SimpleNamespace(type="cuda", index=1), "g1"),
        (SimpleNamespace(type="cpu", index=None), "c0"), (SimpleNamespace(platform="gpu", id=1), "g1"),
        (SimpleNamespace(name="/physical_device:GPU:1"), "g1"),
    ],
)  # fmt: skip
def test_found(given, expected):
    assert devices.find(given, HERE, framework="x") == expected


@pytest.mark.parametrize(
    "given", [2, "cuda:2", "cpu:1", "tpu", "mps", "xpu:0", "99", SimpleNamespace(type="xpu", index=0)]
)
def test_absent(given):
    with pytest.raises(ConfigError, match=r"is not here; x sees cpu:0, gpu:0, gpu:1"):
        devices.find(given, HERE, framework="x")


@pytest.mark.parametrize(
    "given", [-2, True, 1.5, "", "gpu 0", "gpu:-1", "cuda:x", [0], {}, object(), 10**30, "x" * 10**6]
)
def test_no_device(given):
    with pytest.raises(ConfigError, match="device"):
        devices.find(given, HERE, framework="x")


def test_without_an_accelerator():
    here = {"cpu": ["c0"]}
    assert devices.find("auto", here, framework="x") == "c0"
    with pytest.raises(ConfigError, match="not here"):
        devices.find(0, here, framework="x")


def test_every_backend_takes_the_cpu_and_refuses_what_is_not_there(backend):
    import importlib

    as_device = importlib.import_module(f"{backend.__name__}.arrays").as_device
    for given in (-1, "cpu", "cpu:0", "/CPU:0", np.int64(-1), SimpleNamespace(type="cpu", index=None)):
        assert "cpu" in str(as_device(given)).lower()
    assert as_device(None) is None
    for given in (77, "cuda:77", "gpu:77", "/GPU:77", "mps:9", "nowhere", SimpleNamespace(type="cuda", index=77)):
        with pytest.raises(ConfigError, match="device"):
            as_device(given)


def test_every_backend_takes_every_frameworks_dtypes(backend):
    import importlib

    import ml_dtypes

    arrays = importlib.import_module(f"{backend.__name__}.arrays")
    own = arrays.as_dtype("bfloat16")
    given = [own, "bfloat16", "torch.bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)]
    for package in ("torch", "jax.numpy", "tensorflow"):
        if package.partition(".")[0] in sys.modules:
            given.append(importlib.import_module(package).bfloat16)
    assert [arrays.as_dtype(each) for each in given] == [own] * len(given)
    assert arrays.as_dtype(np.float32) == arrays.as_dtype(np.dtype("float32")) == arrays.as_dtype("float32")
    for wrong in ("int3", 3, ["float32"], np.int8, None, object()):
        with pytest.raises(ConfigError, match="dtype"):
            arrays.as_dtype(wrong)
