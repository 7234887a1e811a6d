"""Bytes of a device and collectives of a step, counted by hand and of every published size; what is refused."""

import math
import re

import ml_dtypes
import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import PRESETS
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, InputError, MeshError
from mistral_core.parameters import parameter_count, parameters, shape_of
from mistral_core.plan import DEVICES, Workload, fits, memory_of, mesh_of, plan, suggest
from mistral_core.plan.devices import usable
from mistral_core.quantization import request
from mistral_core.sharding import Sharding

SMALL = TINY.replace(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
    num_hidden_layers=3,
)  # fmt: skip
D, F, V, N, K, H, L = 64, 128, 96, 8, 4, 16, 3
LAYER = 2 * N * H * D + 2 * K * H * D + 3 * F * D
"""Numbers of a layer's matrices."""


def of(found, phase, what):
    """The collectives of a phase whose subject has some words in it, as (kind, axes, count, bytes)."""
    return [(c.kind, c.axes, c.count, c.nbytes) for c in found.collectives if c.phase == phase and what in c.what]


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_every_published_size_are_those_of_the_table(preset):
    config = PRESETS[preset]
    count = parameter_count(config)
    assert plan(config, {}).parameters == 2 * count
    assert plan(config, {}, dtype="fp32").parameters == 4 * count
    for tensor in (2, 8):
        mesh = {"data": 2, "fsdp": 4, "tensor": tensor}
        rules = None if config.vocab_size % tensor == 0 else {"V": None}
        sharding = Sharding.of(config, mesh, rules)
        held = sum(math.prod(sharding.shape(row)) for _, row in parameters(config))
        planned = plan(config, mesh, rules=rules, optimizer="adamw", batch=8)
        assert planned.parameters == planned.gradients == 2 * held
        assert planned.optimizer == 2 * planned.parameters
        assert planned.devices == 8 * tensor


def test_a_training_step_counted_by_hand():
    planned = plan(SMALL, {"data": 2, "tensor": 4}, optimizer="adamw", dtype="bf16", batch=6, sequence=10)
    norms = (2 * L + 1) * D
    held = L * LAYER // 4 + norms + 2 * V * D // 4
    layer = 2 * (4 * D + (2 * N * H + 2 * K * H + 4 * F) // 4) + 4 * 2 * D + 4 * N // 4
    assert planned.bytes == {
        "parameters": 2 * held,
        "gradients": 2 * held,
        "optimizer": 4 * held,
        "cache": 0,
        "activations": 30 * (L * layer + 2 * 2 * D + 4 * D + 3 * 4 * V // 4),
        "copies": 0,
    }
    assert planned.total == sum(planned.bytes.values())
    hidden = 3 * 10 * D * 2
    assert of(planned, "forward", "") == [
        ("all-reduce", ("tensor",), 1, hidden), ("all-reduce", ("tensor",), L, hidden),
        ("all-reduce", ("tensor",), L, hidden), ("all-reduce", ("tensor",), 3, 3 * 9 * 4),
    ]  # fmt: skip
    assert of(planned, "backward", "input") == [
        ("all-reduce", ("tensor",), 1, hidden), ("all-reduce", ("tensor",), L, 2 * hidden),
        ("all-reduce", ("tensor",), L, 3 * hidden),
    ]  # fmt: skip
    assert of(planned, "backward", "of the loss") == [("all-reduce", ("tensor",), 1, 3 * 9 * 4)]
    assert of(planned, "backward", "of a layer") == [("all-reduce", ("data",), L, 2 * (LAYER // 4 + 2 * D))]
    assert of(planned, "backward", "of the rest") == [("all-reduce", ("data",), 1, 2 * (2 * V * D // 4 + D))]


def test_fully_sharded_data_gathers_twice_and_scatters_once():
    """ZeRO stage 3: three times the parameters go over the network, but for the embedding, which is looked up."""
    planned = plan(SMALL, {"data": 3, "fsdp": 2}, optimizer="adamw", dtype="fp32", batch=6, sequence=10)
    layer, rest, embedding = 4 * (LAYER + 2 * D), 4 * (V * D + D), 4 * V * D
    assert planned.parameters == (L * layer + rest + embedding) // 2
    gathered = [("all-gather", ("fsdp",), L, layer), ("all-gather", ("fsdp",), 1, rest)]
    exchanged = [("all-to-all", ("fsdp",), 1, 10 * D * 4)]
    assert of(planned, "forward", "weights") == of(planned, "backward", "weights") == gathered
    assert of(planned, "forward", "embeddings") == of(planned, "backward", "embeddings") == exchanged
    assert of(planned, "backward", "gradients of")[1:] == [
        ("all-reduce", ("data",), 1, (rest + embedding) // 2), ("reduce-scatter", ("fsdp",), L, layer),
        ("all-reduce", ("data",), L, layer // 2), ("reduce-scatter", ("fsdp",), 1, rest),
    ]  # fmt: skip
    over_fsdp = sum(c.sent for c in planned.collectives if c.axes == ("fsdp",))
    assert over_fsdp == 3 * (L * layer + rest) // 2 + 2 * 10 * D * 4 // 2
    over_data = sum(c.sent for c in planned.collectives if c.axes == ("data",))
    assert over_data == 2 * 2 * (L * layer + rest + embedding) // 2 // 3
    assert planned.copies == layer + max(layer, 4 * V * D) * 2


def test_an_embedding_that_is_the_head_too_is_gathered_for_it():
    tied = plan(SMALL.replace(tie_word_embeddings=True), {"fsdp": 2}, batch=2, sequence=10, dtype="fp32")
    assert of(tied, "prefill", "of the rest") == [("all-gather", ("fsdp",), 1, 4 * (V * D + D))]
    assert of(tied, "decode", "embeddings") == [("all-to-all", ("fsdp",), 1, D * 4)]


def test_a_device_that_computes_all_rows_gathers_all_columns_of_their_embeddings():
    whole = plan(SMALL, {"fsdp": 2}, batch=1, sequence=10, dtype="fp32")
    assert of(whole, "prefill", "embeddings") == [("all-gather", ("fsdp",), 1, 10 * D * 4)]
    assert not of(plan(SMALL, {"fsdp": 2}, batch=2, lora=4, optimizer="sgd"), "backward", "embeddings")


def test_a_batch_that_is_not_divided_is_computed_by_all_and_needs_no_sums():
    whole, cut = (plan(SMALL, {"data": 4}, optimizer="sgd", batch=batch, sequence=10) for batch in (6, 8))
    assert whole.activations == cut.activations * 3
    assert not whole.collectives
    assert cut.collectives
    parts = plan(SMALL, {"fsdp": 4}, optimizer="sgd", batch=6, sequence=10)
    assert {c.kind for c in parts.collectives} == {"all-gather"}, "each device has its part of every gradient"


def test_master_weights_make_sixteen_bytes_a_parameter():
    """ZeRO (arXiv 1910.02054), section 3.1: 2 and 2 of 16 bits, and 12 of AdamW with a float32 copy."""
    count = parameter_count(SMALL)
    planned = plan(SMALL, {}, optimizer="adamw", master="fp32")
    assert planned.parameters + planned.gradients + planned.optimizer == 16 * count
    assert plan(SMALL, {}, optimizer="adamw", dtype="fp32", master="fp32").optimizer == 8 * count
    assert [plan(SMALL, {}, optimizer=name).optimizer for name in ("adamw", "lion", "sgd", "none")] == [
        4 * count, 2 * count, 0, 0,
    ]  # fmt: skip


def test_with_remat_a_layer_keeps_its_input_and_reduces_attention_again():
    kept, again = (
        plan(SMALL.replace(num_hidden_layers=20), {"tensor": 2}, optimizer="sgd", sequence=10, remat=remat)
        for remat in (False, True)
    )
    layer = 10 * (2 * (4 * D + (2 * N * H + 2 * K * H + 4 * F) // 2) + 4 * 2 * D + 4 * N // 2)
    assert kept.activations - again.activations == 19 * layer - 20 * 10 * 2 * D
    assert len(again.collectives) == len(kept.collectives) + 1
    assert of(again, "backward", "again") == [("all-reduce", ("tensor",), 20, 10 * D * 2)]


def test_only_adapters_train():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    plain, lora = (
        plan(SMALL, mesh, optimizer="adamw", batch=4, sequence=10, lora=rank) for rank in (None, 8)
    )  # fmt: skip
    # A [r, in] is cut by fsdp where in is D, and by tensor where it is heads or F; B [out, r] the other way round
    a = 8 * (5 * D // 2 + N * H // 2 + F // 2)
    b = 8 * ((N * H + 2 * K * H + 2 * F) // 2 + 2 * D // 2)
    assert lora.parameters - plain.parameters == 4 * L * (a + b)
    assert lora.gradients == 4 * L * (a + b)
    assert lora.optimizer == 2 * lora.gradients
    assert not of(lora, "backward", "gradients of the rest")
    low = 10 * 8 * 4  # B T rank in float32
    assert of(lora, "forward", "A x") == [("all-reduce", ("tensor",), L, low)] * 2
    assert of(lora, "backward", "A x of the MLP") == [("all-reduce", ("tensor",), L, 2 * low)]
    (inputs,) = of(lora, "backward", "attention's input")
    assert inputs[2] == L - 1, "the first layer's input needs no gradient"
    assert plan(SMALL, mesh, lora=8).parameters == lora.parameters, "adapters are there in inference too"
    shapes = {held.row.name: lora.workload.shape(held) for held in lora.workload.tensors}
    assert shapes["model.layers.{}.mlp.up_proj.lora_A.weight"] == (8, D // 2)
    assert shapes["model.layers.{}.mlp.up_proj.lora_B.weight"] == (F // 2, 8)
    assert shapes["model.layers.{}.mlp.down_proj.lora_A.weight"] == (8, F // 2)
    assert shapes["model.layers.{}.mlp.down_proj.lora_B.weight"] == (D // 2, 8)


@pytest.mark.parametrize(("scheme", "group"), [("int8", None), ("int8", 32), ("int4", 32), ("int4", -1), ("nf4", 16)])
def test_packed_matrices_take_what_they_take(scheme, group):
    asked = request.Quantization(scheme, group)
    resolved, total = asked.resolved(SMALL, "MistralForCausalLM"), 0
    packed = set(resolved.matrices(SMALL, "MistralForCausalLM"))
    for name, array in random_parameters(SMALL).items():
        half = array.astype(ml_dtypes.bfloat16)
        total += resolved.quantise(name, half).nbytes if name in packed else half.nbytes
    planned = plan(SMALL, {}, quantization=asked)
    assert planned.parameters == total
    assert planned.copies == 2 * F * D
    halves = plan(SMALL, {"fsdp": 2, "tensor": 2}, quantization=asked)
    assert planned.parameters / 4 <= halves.parameters < planned.parameters / 3.6  # norms, and scales of whole rows


def test_a_scale_of_a_whole_row_stands_beside_every_part_of_it():
    one, two = (plan(SMALL, mesh, quantization="int8").parameters for mesh in ({}, {"fsdp": 2}))
    scales = L * (N * H + 2 * K * H + 2 * D + 2 * F)
    cut = L * 2 * D  # those of o_proj and down_proj, whose rows are the hidden size
    assert two == (one - 2 * scales) // 2 + 2 * (scales - cut) + cut


def test_a_group_of_columns_is_not_cut():
    with pytest.raises(
        MeshError,
        match=r"got 16 columns of model.layers.0.self_attn.q_proj.weight a device in groups "
        r"of 32; a group_size of 16 fits\.",
    ):
        plan(SMALL, {"fsdp": 4}, quantization=request.Quantization("int4", 32))
    plan(SMALL, {"fsdp": 4}, quantization=request.Quantization("int4", 16))
    with pytest.raises(MeshError, match=r"got 1 columns .* in groups of 2; choose a mesh of fewer parts"):
        plan(SMALL, {"fsdp": 64}, quantization=request.Quantization("int4", -1))
    plan(SMALL, {"fsdp": 64}, quantization="int8")


def test_a_cache_has_the_slots_of_its_windows():
    planned = plan(SMALL, {"data": 2, "tensor": 2}, batch=6, sequence=100)
    assert planned.cache == 3 * (L * 2 * (5 + 1) * 2 * H * 2 + 4)  # TINY's window is 5
    whole = SMALL.replace(sliding_window=None)
    assert plan(whole, {}, sequence=100).cache == L * 2 * 101 * K * H * 2 + 4
    assert plan(whole, {}, sequence=100, cache_dtype="int8").cache == L * 2 * 101 * K * (H + 4) + 4
    assert plan(whole, {"tensor": 8}, sequence=100).cache == plan(whole, {}, sequence=100).cache, "K < tensor: whole"


def test_inference_has_a_prefill_and_steps_of_one_token():
    planned = plan(SMALL, {"data": 2, "tensor": 4}, batch=6, sequence=10)
    assert planned.gradients == planned.optimizer == planned.copies == 0
    for phase, tokens in (("prefill", 10), ("decode", 1)):
        hidden = 3 * tokens * D * 2
        assert of(planned, phase, "") == [
            ("all-reduce", ("tensor",), 1, hidden), ("all-reduce", ("tensor",), L, hidden),
            ("all-reduce", ("tensor",), L, hidden), ("all-gather", ("tensor",), 1, 3 * V * 4),
        ]  # fmt: skip
    assert planned.activations == 3 * (10 * 2 * (3 * D + 3 * F // 4) + 4 * V // 4)


def test_heads_without_a_vocabulary_have_no_logits():
    planned = plan(SMALL, {"tensor": 2}, architecture="MistralForSequenceClassification", optimizer="adamw")
    assert not of(planned, "forward", "loss")
    assert not of(planned, "backward", "head")
    assert planned.parameters < plan(SMALL, {"tensor": 2}).parameters


def test_one_device_sends_nothing():
    assert not plan(SMALL, {"data": 1, "tensor": 1}, optimizer="adamw", remat=True, lora=4).collectives


def test_key_value_heads_that_are_repeated_are_whole():
    planned = plan(SMALL, {"tensor": 8}, optimizer="adamw", sequence=10)
    assert planned.parameters == 2 * (
        L * (2 * N * H * D // 8 + 2 * K * H * D + 3 * F * D // 8 + 2 * D) + D + 2 * V * D // 8
    )
    assert of(planned, "backward", "attention's input") == [("all-reduce", ("tensor",), L, 10 * D * 2)]
    assert of(planned, "backward", "value head") == [("all-reduce", ("tensor",), L, 2 * 10 * H * 2)]
    assert of(planned, "backward", "of values") == [("all-gather", ("tensor",), 2 * L, 10 * K * H * 2)]


@pytest.mark.parametrize(
    ("preset", "device", "options", "mesh"),
    [
        ("mistral-7b-v0.3", "rtx4090", {}, {}),
        ("mistral-7b-v0.3", "tpu-v5e", {}, {"tensor": 2}),
        ("mistral-7b-v0.3", "tpu-v5e", {"quantization": "int4"}, {}),
        ("mistral-large-123b-2411", "h100", {}, {"tensor": 4}),
        ("openorca-mistral-7b", "tpu-v5e", {}, {"tensor": 2}),
        ("openorca-mistral-7b", "8GB", {}, {"fsdp": 2, "tensor": 2}),  # 32002 is not divided by 4
        ("mistral-large-123b-2411", "8GB", {"optimizer": "adamw", "sequence": 1 << 20}, None),
    ],
)
def test_the_smallest_mesh(preset, device, options, mesh):
    memory, config = memory_of(device), PRESETS[preset]
    found = suggest(config, memory, **options)
    assert (None if found is None else found.mesh) == mesh
    if found is None:
        return
    assert fits(found, memory)
    assert found.total <= 0.9 * memory
    for fewer in ({}, {"tensor": 2}, {"fsdp": 2}, {"tensor": 4}, {"fsdp": 4}):
        if math.prod(fewer.values()) < found.devices:
            assert not fits(plan(config, fewer, **options), memory)


def test_every_published_size_finds_a_mesh():
    for config in PRESETS.values():
        assert suggest(config, memory_of("h100"), optimizer="adamw", remat=True, batch=8) is not None


def test_devices_by_name_and_by_size():
    assert memory_of("H100") == memory_of("80GB") == memory_of("80 gb") == 80 * 10**9
    assert memory_of("1.5GiB") == 3 * 2**29
    assert usable(1000) == 900
    assert all(10**10 < memory < 10**12 for memory in DEVICES.values())
    for wrong in ("h1000", "80", "GB", "-1GB", ""):
        with pytest.raises(ConfigError, match=r"device must be a size such as 80GB or one of b200, "):
            memory_of(wrong)


def test_a_mesh_from_its_text():
    assert mesh_of("data=4, tensor=8") == {"data": 4, "tensor": 8}
    assert mesh_of("") == {}
    for wrong in ("8", "data", "data=0", "data=-1", "data=2,data=2", "data=1.5", "data:4"):
        with pytest.raises(MeshError, match=re.escape(f"got {wrong!r}; write it as data=4,tensor=8.")):
            mesh_of(wrong)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"dtype": "int8"}, ConfigError, "dtype must be one of float32, bfloat16, float16, fp32, .*, got 'int8'"),
        ({"batch": 0}, InputError, "batch must be a positive integer, got 0"),
        ({"sequence": 1.5}, InputError, "sequence must be a positive integer, got 1.5"),
        ({"lora": 0}, InputError, "lora must be a positive integer, got 0"),
        ({"optimizer": "adam"}, ConfigError, "optimizer must be one of none, adamw, lion, sgd, got 'adam'"),
        ({"optimizer": "sgd", "quantization": "int4"}, ConfigError, "quantization must be None where all .* lora=16"),
        ({"optimizer": "sgd", "master": "bf16"}, ConfigError, "master must be None or float32, got bfloat16"),
        ({"optimizer": "sgd", "cache_dtype": "int8"}, ConfigError, "cache_dtype must not be given in training"),
        ({"remat": True}, ConfigError, "remat must not be given in inference, got True; give an optimizer"),
        ({"master": "fp32"}, ConfigError, "master must not be given in inference"),
        ({"cache_dtype": "int4"}, ConfigError, "got 'int4'"),
        ({"quantization": "int3"}, ConfigError, "got 'int3'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_means_nothing_is_refused(options, kind, says):
    with pytest.raises(kind, match=says):
        plan(SMALL, {}, **options)


def test_a_mesh_that_does_not_fit_is_refused_as_a_sharding_is():
    with pytest.raises(MeshError, match=r"tensor may be 1, 2, 4, 8"):
        plan(SMALL, {"tensor": 3})


def test_dtypes_have_two_spellings():
    spelled = ("fp32", "f32", "bf16", "fp16", "f16", np.float16, "torch.bfloat16")
    assert [Workload.of(SMALL, {}, dtype=given).dtype for given in spelled] == [
        "float32", "float32", "bfloat16", "float16", "float16", "float16", "bfloat16",
    ]  # fmt: skip
    assert Workload.of(SMALL, {}, cache_dtype="bf16", dtype="fp32").cache_dtype == "bfloat16"


def test_shapes_on_one_device_are_those_of_the_table():
    work = Workload.of(SMALL, {})
    for held in work.tensors:
        assert work.shape(held) == shape_of(held.row, SMALL)
    assert sum(held.times for held in work.tensors) == len(list(parameters(SMALL)))
