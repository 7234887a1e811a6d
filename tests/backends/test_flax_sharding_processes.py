"""Two processes of `jax.distributed` hold one model: what they compute, choose, load and save is what one device does.

Each has two virtual devices of its own, runs `flax_process.py` and says what it found.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core.weights import loading

pytest.importorskip("jax")

SECONDS = 600
"""A guard against hanging only."""


def started(task, directory):
    """Both processes of a task."""
    with socket.socket() as bound:  # a port that was free a moment ago
        bound.bind(("127.0.0.1", 0))
        port = str(bound.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    command = [sys.executable, str(Path(__file__).with_name("flax_process.py")), task]
    return [
        subprocess.Popen(
            [*command, rank, port, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for rank in "01"
    ]


def ended(processes):
    """What each wrote; none is left."""
    try:
        return [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(directory):
    processes = started("everything", directory)
    outs = ended(processes)
    for process, (_, errors) in zip(processes, outs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outs]


def test_each_process_reads_what_its_devices_hold(found):
    for of in found:
        read, held, whole = of["read"]
        assert read == held
        assert read < 0.51 * whole  # the other half of fsdp is the other's


def test_calls_outside_of_jit_are_those_of_one_device(found):
    for of in found:
        assert of["eager"] < 2e-6
        assert of["loss"] < 5e-7
        assert of["global loss"] < 5e-7
        assert of["gradients"] < 2e-6
        assert of["refused"] == "TokenIdError", "NumPy is checked, though the model is of several processes"


def test_text_is_that_of_one_device(found):
    for of in found:
        assert of["text"] == dict.fromkeys(of["text"], True)
        assert len(of["text"]) == 6


def test_processes_do_not_part(found):
    one, two = found
    assert one["unseeded"] == two["unseeded"], "the seed is the first one's"
    assert one["columns"] == two["columns"] == [1, 3], "the time is over, or a streamer ends, in one of them"


def test_a_training_step_is_that_of_one_device(found):
    for of in found:
        losses, weights = of["steps"]
        assert losses < 5e-7
        assert weights < 2e-4


def test_the_first_process_saves_what_all_hold(found):
    for of, error in zip(found, ("OutputExistsError", "ConversionError"), strict=True):
        assert of["saved again"]
        assert of["saved stacked"]
        assert of["saved packed"]
        assert of["no overwriting"] == error
        assert of["left"] == ["again", "one", "packed", "stacked"]


@pytest.mark.parametrize(
    "task",
    [
        "steps 1",
        "saving 1",
        *(pytest.param(task, marks=pytest.mark.sweep) for task in ("steps 0", "loading 1", "saving 0")),
    ],
)
def test_where_a_process_is_killed_the_other_ends_and_nothing_is_half_written(tmp_path, task):
    lost = int(task[-1])
    processes = started(task, tmp_path)
    outs = ended(processes)
    assert processes[lost].returncode == -9, outs[lost][1][-2000:]
    assert processes[1 - lost].returncode not in (0, -9)
    assert ("started" in outs[1 - lost][1]) or task == "loading 1", outs[1 - lost][1][-4000:]
    config, tensors = loading.load(tmp_path / "one", verify="full")
    expected = random_parameters(config, "MistralForCausalLM")
    assert all(np.array_equal(array, expected[name]) for name, array in tensors)
