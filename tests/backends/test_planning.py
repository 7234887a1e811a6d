"""A plan is what frameworks hold and what XLA compiles: bytes to the byte, collectives one by one.

JAX runs on eight virtual devices in a process of its own. Activations are not constrained there, and so collectives are
compared on meshes of `tensor` alone, for which XLA needs no constraints.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

import mistral_torch
from mistral_core import PRESETS
from mistral_core.config.presets import TINY
from mistral_core.plan import plan
from mistral_core.plan.workload import Workload

CONFIG = TINY.replace(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_attention_heads=8, num_key_value_heads=4, head_dim=6
)
WIDE = TINY.replace(
    vocab_size=96, hidden_size=256, intermediate_size=896, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    sliding_window=None,
)  # fmt: skip
"""Of the proportions of a published size, for what is only near."""
B, T = 4, 16
COUNTERS = 4 + 4
"""Bytes of the counts of steps that optax and nnx.Optimizer keep, which a plan leaves out."""

JAX = """
import json, math, re, sys
import jax, jax.numpy as jnp, optax
from flax import nnx
from mistral_core import MistralConfig
from mistral_core.sharding import Sharding
from mistral_flax import KVCache, MistralForCausalLM

fields, B, T = json.load(sys.stdin)
CONFIG = MistralConfig(**fields)


class Placed:
    def __init__(self, sizes, layers):
        self.config = CONFIG.replace(num_hidden_layers=layers)
        self.sharding = Sharding.of(self.config, sizes)
        names, count = tuple(sizes), math.prod(sizes.values())
        kinds = (jax.sharding.AxisType.Auto,) * len(names)
        self.mesh = jax.make_mesh(tuple(sizes.values()), names, axis_types=kinds, devices=jax.devices()[:count])
        self.specs = {name: self.named(spec) for name, row, spec in self.sharding.table()}

    def named(self, spec):
        return jax.NamedSharding(self.mesh, jax.P(*(axes or None for axes in spec)))


def argument_bytes(sizes, layers, dtype):
    "Of the parameters, and of them with the state of AdamW, as a compiled program takes them."
    placed = Placed(sizes, layers)
    model = MistralForCausalLM(placed.config, dtype=jnp.dtype(dtype))
    params = {name: jax.device_put(array, placed.specs[name]) for name, array in model.params.items()}
    model = model.bind(params)
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    taken = lambda tree: jax.jit(lambda x: x).lower(tree).compile().memory_analysis().argument_size_in_bytes
    return taken(params), taken((params, nnx.state(optimizer)))


def cache_bytes(sizes, layers, dtype):
    "Of a cache, on the first device."
    placed = Placed(sizes, layers)
    cache = KVCache.allocate(placed.config, B, T, dtype=jnp.dtype(dtype))
    letters = {4: "BRKH", 3: "BRK", 1: "B"}
    leaves = [
        jax.device_put(x, placed.named(placed.sharding.activation(letters[x.ndim], {"B": B})))
        for x in jax.tree.leaves(cache)
    ]
    return sum(x.addressable_shards[0].data.nbytes for x in leaves)


def collectives(sizes, layers, trains, remat=False):
    "(Kind, bytes) of each collective of a compiled program."
    placed = Placed(sizes, layers)
    model = nnx.eval_shape(lambda: MistralForCausalLM(placed.config))
    if remat:
        model.gradient_checkpointing_enable()
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed.specs[name]) for name, x in model.params.items()
    }
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=placed.named(()))
    loss = lambda params, ids: model(ids, params=params, labels=ids, use_cache=False).loss
    if trains:
        program = jax.jit(jax.value_and_grad(loss), out_shardings=(placed.named(()), placed.specs))
    else:
        program = jax.jit(lambda params, ids: model(ids, params=params, use_cache=False).logits)
    text = program.lower(params, ids).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\\(", text)
    assert "f32[" in text and all("f32[" in shapes for shapes, _ in found), found
    size = lambda shape: 4 * math.prod(int(n) for n in shape.split(",") if n)
    return [(kind, sum(size(shape) for shape in re.findall(r"f32\\[([\\d,]*)\\]", shapes))) for shapes, kind in found]


MESHES = {"data": {"data": 2, "tensor": 4}, "fsdp": {"fsdp": 2, "tensor": 2}, "few": {"fsdp": 1, "tensor": 8}}
print(json.dumps({
    "arguments": [
        (sizes, layers, dtype, *argument_bytes(sizes, layers, dtype))
        for sizes in MESHES.values() for layers, dtype in ((1, "bfloat16"), (2, "float32"))
    ],
    "cache": [
        (sizes, layers, dtype, cache_bytes(sizes, layers, dtype))
        for sizes in MESHES.values() for layers, dtype in ((1, "bfloat16"), (2, "int8"))
    ],
    "forward": [collectives({"tensor": 4}, layers, False) for layers in (1, 2)],
    "step": [collectives({"tensor": 4}, layers, True) for layers in (1, 2)],
    "remat": [collectives({"tensor": 4}, layers, True, True) for layers in (1, 2)],
    "few": [collectives({"tensor": 8}, layers, True) for layers in (1, 2)],
}))
"""


@functools.cache
def measured() -> dict:
    """What JAX says."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", JAX],
        input=json.dumps((CONFIG.to_dict(), B, T)),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def planned(mesh, layers, **options):
    return plan(CONFIG.replace(num_hidden_layers=layers), mesh, batch=B, sequence=T, **options)


def test_parameters_and_moments_are_what_a_compiled_program_takes():
    found = measured()["arguments"]
    assert len(found) == 6
    for mesh, layers, dtype, parameters, with_moments in found:
        expected = planned(mesh, layers, dtype=dtype, optimizer="adamw")
        assert parameters == expected.parameters, (mesh, layers)
        # the optimizer's state has no parameters of its own, and a program takes them once
        assert with_moments == expected.parameters + expected.optimizer + COUNTERS, (mesh, layers)


def test_a_cache_is_what_a_device_holds():
    found = measured()["cache"]
    assert len(found) == 6
    for mesh, layers, dtype, size in found:
        assert size == planned(mesh, layers, cache_dtype=dtype).cache, (mesh, layers)


def test_the_collectives_of_a_forward_pass():
    """The embedding's, and two a layer; that the logits are gathered is the sampler's wish."""
    for layers, found in enumerate(measured()["forward"], 1):
        expected = planned({"tensor": 4}, layers, dtype="float32").collectives
        listed = [
            (c.kind, c.nbytes) for c in expected if c.phase == "prefill" and c.what != "logits" for _ in range(c.count)
        ]
        assert sorted(map(tuple, found)) == sorted(listed)
        assert len(found) == 1 + 2 * layers


@pytest.mark.parametrize("name", ["step", "few", "remat"])
def test_what_a_layer_adds_to_the_collectives_of_a_training_step(name):
    """Counts and bytes by kind. What is computed again XLA sends beside the loss, in no operation of its own."""
    options = {"dtype": "float32", "optimizer": "adamw", "remat": name == "remat"}
    tensor = 8 if name == "few" else 4  # 4 key/value heads on 8 devices
    first, second = (planned({"tensor": tensor}, layers, **options).collectives for layers in (1, 2))
    one, two = measured()[name]
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        size = sum(nbytes for each, nbytes in two if each == kind) - sum(nbytes for each, nbytes in one if each == kind)
        assert size == sum(c.count * c.nbytes for c in second if c.kind == kind) - sum(
            c.count * c.nbytes for c in first if c.kind == kind
        ), kind
        if name != "remat":
            count = sum(each == kind for each, _ in two) - sum(each == kind for each, _ in one)
            assert count == sum(c.count for c in second if c.kind == kind) - sum(
                c.count for c in first if c.kind == kind
            ), kind


def test_a_training_step_of_one_layer_has_as_many_collectives_as_planned():
    expected = planned({"tensor": 4}, 1, dtype="float32", optimizer="adamw").collectives
    assert len(measured()["step"][0]) == sum(c.count for c in expected)


@pytest.mark.parametrize("preset", ["mistral-7b-v0.3", "ministral-3-3b", "mistral-large-123b-2411"])
def test_every_parameter_of_one_device_is_that_of_a_model_without_numbers(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = mistral_torch.MistralForCausalLM(config).to(torch.bfloat16)
    found = {name: tensor.numel() * tensor.element_size() for name, tensor in model.named_parameters()}
    work = Workload.of(config, {})
    expected = {held.row.name.format(index): work.nbytes(held) for held in work.tensors for index in range(held.times)}
    assert found == expected
    assert sum(found.values()) == plan(config, {}).parameters


def test_the_moments_of_torch_have_the_dtype_of_the_parameters():
    model = mistral_torch.MistralForCausalLM(CONFIG).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [x for each in optimizer.state.values() for name, x in each.items() if name != "step"]
    expected = plan(CONFIG, {}, optimizer="adamw")
    assert sum(x.nbytes for x in state) == expected.optimizer
    assert sum(parameter.grad.nbytes for parameter in model.parameters()) == expected.gradients


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_packed_matrices_of_a_model(scheme):
    model = mistral_torch.MistralForCausalLM(CONFIG).to(torch.bfloat16)
    mistral_torch.quantize(model, scheme)
    found = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert found == plan(CONFIG, {}, quantization=scheme).parameters


def kept(layers, dtype, *, remat):
    """Bytes that a forward pass of PyTorch keeps for backward beside the parameters."""
    model = mistral_torch.MistralForCausalLM(WIDE.replace(num_hidden_layers=layers)).to(dtype).train()
    if remat:
        model.gradient_checkpointing_enable()
    ids, storages = torch.zeros((B, 64), dtype=torch.int64), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_estimate_of_what_a_layer_keeps_is_near_what_torch_keeps(dtype, remat):
    found = kept(2, getattr(torch, dtype), remat=remat) - kept(1, getattr(torch, dtype), remat=remat)
    one, two = (
        plan(
            WIDE.replace(num_hidden_layers=layers),
            {},
            dtype=dtype,
            optimizer="adamw",
            remat=remat,
            batch=B,
            sequence=64,
        ).activations
        for layers in (1, 2)
    )
    assert abs(found - (two - one)) <= (0 if remat else 0.05 * found)
