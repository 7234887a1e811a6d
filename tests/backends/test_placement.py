"""Where parameters go: on one device, or each where a function of its name says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import ConfigError
from mistral_core.parameters import shapes

CAUSAL = "MistralForCausalLM"


def test_pytorch_asks_of_each_name():
    torch = pytest.importorskip("torch")
    import mistral_torch

    asked = []

    def place(name):
        asked.append(name)
        return "meta" if ".layers.1." in name else "cpu"

    model = mistral_torch.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, device=place)
    assert sorted(asked) == sorted(shapes(model.config, CAUSAL))
    found = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert {name for name, kind in found.items() if kind == "meta"} == {name for name in found if ".layers.1." in name}
    with pytest.raises(ConfigError, match="device"):
        mistral_torch.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, device=lambda name: "nowhere")
    assert torch.equal(
        model.lm_head.weight, mistral_torch.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT).lm_head.weight
    )


SHARDED = """
import os
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.weights.containers import tensor_file
from mistral_flax import MistralForCausalLM

mesh = Mesh(np.array(jax.devices()), ("x",))
assert len(jax.devices()) == 2
name = "model.embed_tokens.weight"

def place(each):
    return NamedSharding(mesh, P("x") if each == name else P())

read, preadv = [], os.preadv
tensor_file.os.preadv = lambda *given: read.append(preadv(*given)) or read[-1]
model = MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, device=place)
whole = MistralForCausalLM.from_pretrained(TINY_CHECKPOINT)
ours, theirs = model.params, whole.params
for each in theirs:
    assert (np.asarray(ours[each]).view(np.uint16) == np.asarray(theirs[each]).view(np.uint16)).all(), each
parts = ours[name].addressable_shards
assert [part.data.shape[0] * 2 for part in parts] == [ours[name].shape[0]] * 2
half = ours[name].nbytes // 2
assert read.count(half) >= 2, "each device reads its half"
"""


def test_jax_reads_for_each_device_its_part():
    pytest.importorskip("jax")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_tensorflow_takes_one_device():
    pytest.importorskip("tensorflow")
    import mistral_tf

    with pytest.raises(ConfigError, match="device must be"):
        mistral_tf.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT, device=lambda name: "cpu")
