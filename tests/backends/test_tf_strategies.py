"""Keras models under strategies of tf.distribute are the models on one device; what cannot be is refused.

Two logical CPUs have a process of their own, two workers a process each; the tests look at what those print.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")
pytest.importorskip("tensorflow")

import mistral_tf  # noqa: E402
from mistral_core.config.presets import TINY  # noqa: E402
from mistral_core.data import TINY_CHECKPOINT  # noqa: E402
from mistral_core.errors import UnsupportedFeatureError  # noqa: E402
from mistral_core.parameters import HEADS  # noqa: E402

HERE = Path(__file__).parent
WAIT = 600
"""Seconds after which a process hangs."""
CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 5))
LOOPS = {f"{name} in {parts}": (name, parts) for name in HEADS if name != "MistralModel" for parts in (1, 2)}
FURTHER = [loop for loop, (name, parts) in LOOPS.items() if parts == 1 and name != "MistralForCausalLM"]
"""Steps in one part for which the language model's stands, and each head's in two."""
# largest seen, of gradients, weights and logs: 2e-6
BOUND = 5e-6

strategies = pytest.mark.feature("tf.distribute strategies")


def started(script, *arguments):
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(output):
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def replicas(tmp_path_factory, asked_for):
    """What a MirroredStrategy of two logical CPUs gave beside one device."""
    process = started("tf_replicas.py", tmp_path_factory.mktemp("replicas"), json.dumps(asked_for(LOOPS)))
    try:
        output, errors = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-2000:]
    return said(output)


@strategies
@pytest.mark.parametrize(
    "case", ["loss by name", "a replica without rows", "class weights", "two outputs", "a sum"]
)  # fmt: skip
def test_replicas_fit_and_evaluate_as_one_device_does(replicas, case):
    """Weights of rows and classes, metrics, batches whose rows do not divide, one of which one replica has all."""
    assert max(replicas["fits"][case].values()) < BOUND, replicas["fits"][case]


@strategies
@pytest.mark.parametrize(
    "loop", [pytest.param(loop, marks=pytest.mark.slow if loop in FURTHER else ()) for loop in LOOPS]
)
def test_gradients_of_replicas_with_2_and_30_labels_are_those_of_one_device(replicas, loop):
    assert replicas["loops"][loop] < BOUND


@strategies
def test_a_model_under_a_strategy_generates_and_is_saved_loaded_resized_and_packed(replicas):
    assert len(replicas["lives"]) == 8
    assert [name for name, right in replicas["lives"].items() if not right] == []


@strategies
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("jit_compile", "UnsupportedFeatureError: compile: jit_compile must be False with several replicas"),
        ("steps_per_execution", "UnsupportedFeatureError: compile: steps_per_execution must be 1 with several"),
        ("a model from outside", "ConfigError: MirroredStrategy: the model must be made under its scope"),
        ("a compiled model from outside", "ConfigError: MirroredStrategy: the model must be made under its scope"),
        ("an optimizer from outside", "ConfigError: MirroredStrategy: the optimizer must be made under its scope"),
        ("no error", "nothing"),
    ],
)
def test_what_keras_does_wrong_or_fails_in_with_replicas_is_refused(replicas, case, expected):
    assert replicas["refusals"][case].startswith(expected)


def workers(task, directory):
    """What two workers print until both have ended."""
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    processes = [started("tf_worker.py", task, rank, *ports, directory) for rank in range(2)]
    until = time.monotonic() + WAIT
    try:
        waited = [process.communicate(timeout=until - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, output, errors) for p, (output, errors) in zip(processes, waited, strict=True)]


@strategies
def test_two_workers_train_generate_and_save_as_one_device_does(tmp_path):
    """In a loop of one's own, in fit, evaluate and predict; rows do not divide; the first worker alone writes."""
    (tmp_path / "a file").touch()
    for rank, (code, output, errors) in enumerate(workers("everything", tmp_path)):
        assert code == 0, errors[-2000:]
        found = said(output)
        assert max(found[name] for name in ("by hand", "by name", "fit")) < BOUND, found
        assert found["generate"] is found["saved"] is True
        expected = "a file" if rank == 0 else "the first process could not write"
        assert re.match(f"ConversionError: .*{expected}", found["unwritten"])
        assert "save_pretrained(directory) in all of them" in found["pushed"]
    assert mistral_tf.MistralForCausalLM.from_pretrained(tmp_path / "saved", verify="full")


@strategies
@pytest.mark.parametrize(
    ("task", "error"),
    [
        pytest.param("steps 1", "UnavailableError", marks=pytest.mark.sweep),
        pytest.param("saving 0", "ConversionError: save: another worker is gone", marks=pytest.mark.sweep),
    ],
)
def test_a_worker_ends_with_an_error_when_the_other_is_killed(task, error, tmp_path):
    """What is on disk is the checkpoint before, whole."""
    found = workers(task, tmp_path)
    killed = int(task[-1])
    assert [output.splitlines()[0] for _, output, _ in found] == ["alive"] * 2, found
    assert found[killed][0] == -9
    assert said(found[1 - killed][1])["ended"].startswith(error)
    model = mistral_tf.MistralForCausalLM.from_pretrained(tmp_path / "saved", verify="full")
    if task == "saving 0":  # what the writer had begun is there, beside it and by another name, until the next save
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".saved.tmp-")]
        model.save_pretrained(tmp_path / "saved")
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".lock"] == ["saved"]


@pytest.fixture
def model():
    """A model that has been traced for all that is done with it."""
    model = mistral_tf.MistralForCausalLM(CONFIG)
    model.compile("sgd")
    model.fit(IDS, IDS, verbose=0)
    model.predict(IDS, verbose=0)
    return model


@strategies
@pytest.mark.parametrize("kind", ["DataParallel", "ModelParallel"])
def test_keras_distribution_is_refused_with_advice(model, kind):
    """Keras 3 on TensorFlow ignores the first and fails in the second."""
    there = keras.distribution
    if kind == "DataParallel":
        distribution = there.DataParallel(devices=["cpu:0"])
    else:
        mesh = there.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
        distribution = there.ModelParallel(layout_map=there.LayoutMap(mesh), batch_dim_name="batch")
    attempts = [
        lambda: mistral_tf.MistralForCausalLM(CONFIG),
        lambda: mistral_tf.AutoModelForCausalLM.from_pretrained(TINY_CHECKPOINT),
        lambda: mistral_tf.MistralForCausalLM.from_pretrained("nothing/like/it"),
        lambda: model(IDS),
        lambda: model.fit(IDS, IDS, verbose=0),
        lambda: model.evaluate(IDS, IDS, verbose=0),
        lambda: model.predict(IDS, verbose=0),
        lambda: model.train_on_batch(IDS, IDS),
        lambda: model.generate(IDS, max_new_tokens=2),
    ]
    there.set_distribution(distribution)
    try:
        for attempt in attempts:
            with pytest.raises(UnsupportedFeatureError, match=f"{kind} is set.*MirroredStrategy.*mistral_flax"):
                attempt()
    finally:
        there.set_distribution(None)
    assert model(IDS).logits.shape == (2, 5, CONFIG.vocab_size)
