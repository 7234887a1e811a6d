"""Two processes of `jax.distributed` hold one model: what they compute, choose, load and save is what one device does.

Each has two virtual devices of its own, runs `flax_process.py` and says what it found.
"""

from __future__ import annotations

import json
import os
import re
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


def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])


def started(*command, directory):
    """Two processes, by a command in which RANK stands for the number of each."""
    flags = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    return [
        subprocess.Popen(
            [sys.executable, *(rank if each == "RANK" else each for each in command)],
            cwd=directory, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip


def at_task(task, directory):
    """Both processes of a task of `flax_process.py`."""
    program = str(Path(__file__).with_name("flax_process.py"))
    return started(program, task, "RANK", free_port(), str(directory), directory=directory)


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
    processes = at_task("everything", directory)
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
        "saving 1",
        *(pytest.param(task, marks=pytest.mark.sweep) for task in ("steps 0", "steps 1", "loading 1", "saving 0")),
    ],
)
def test_where_a_process_is_killed_the_other_ends_and_nothing_is_half_written(tmp_path, task):
    lost = int(task[-1])
    processes = at_task(task, tmp_path)
    outs = ended(processes)
    assert processes[lost].returncode == -9, outs[lost][1][-2000:]
    assert processes[1 - lost].returncode not in (0, -9)
    assert ("started" in outs[1 - lost][1]) or task == "loading 1", outs[1 - lost][1][-4000:]
    config, tensors = loading.load(tmp_path / "one", verify="full")
    expected = random_parameters(config, "MistralForCausalLM")
    assert all(np.array_equal(array, expected[name]) for name, array in tensors)


@pytest.mark.sweep
def test_the_program_of_the_page_runs_in_two_processes(tmp_path):
    page = (Path(__file__).parents[2] / "docs/launchers/jax-distributed.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "127.0.0.1:12321" in program
    (tmp_path / "train.py").write_text(program.replace("12321", free_port()))
    processes = started("train.py", "RANK", directory=tmp_path)
    outs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], [errors[-4000:] for _, errors in outs]
    assert [out.endswith("True\n") for out, _ in outs] == [True, False]  # gloo writes there too
    assert loading.load(tmp_path / "trained", verify="full")
