"""Matrices of few bits in Flax's own ways: variables that nothing trains, transforms, graphs, scans, XLA's memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.quantization import rounding
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.matrix import dequantised as exact
from mistral_flax import MistralForCausalLM, Quantization, dequantize, generate, quantize
from mistral_flax.compat import FlaxMistralForCausalLM
from mistral_flax.products import PackedWeight, packed_product
from mistral_flax.quantize import Packed, put
from mistral_flax.scan import scan_layers, unscan_layers

CONFIG = TINY.replace(num_hidden_layers=1)
DEEP = TINY.replace(num_hidden_layers=2)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
PARAMETERS = random_parameters(CONFIG, "MistralForCausalLM")
DEEP_PARAMETERS = random_parameters(DEEP, "MistralForCausalLM")
HALVES = {name: array.astype("bfloat16") for name, array in DEEP_PARAMETERS.items()}
PACKINGS = {
    "int8": Quantization("int8"),
    "int4": Quantization("int4", 16, symmetric=False),
    "nf4": Quantization("nf4", 16),
}
packings = pytest.mark.parametrize("packing", PACKINGS)


def plain(*, deep=False):
    config, parameters = (DEEP, DEEP_PARAMETERS) if deep else (CONFIG, PARAMETERS)
    return MistralForCausalLM(config).load_arrays(parameters)


def packed(packing="int4", *, deep=False):
    return quantize(plain(deep=deep), PACKINGS[packing])


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() <= 2e-5 * np.abs(b).max()


def weight(shape, packing, rng):
    """A matrix of floats in few bits, for NumPy and for the products."""
    numbers, asked = rng.normal(size=shape).astype(np.float32), PACKINGS[packing]
    group = shape[1] if asked.group_size is None else asked.group_size
    scale, zero = rounding.scales(numbers, asked.scheme, group, symmetric=asked.symmetric)
    return of(rounding.nearest(numbers, asked.scheme, group, scale, zero))


def of(matrix):
    arrays = (None if array is None else jnp.asarray(array) for array in matrix[1:4])
    return matrix, PackedWeight(*arrays, matrix.kind, matrix.shape, matrix.block)


# Products


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("packing", [*PACKINGS, "fp8", "odd"])
def test_a_packed_product_is_exact_in_float32(packing, rows):
    rng = np.random.default_rng(1)
    if packing == "fp8":
        codes = rng.integers(0, 126, (12, 96)).astype(np.uint8)
        matrix, given = of(PackedMatrix("fp8", codes, rng.random((3, 3), np.float32), None, (12, 96), (5, 32)))
    elif packing == "odd":  # columns in odd blocks and of an odd number, whose last byte has a half to spare
        codes, scale = rng.integers(0, 16, (12, 49)).astype(np.uint8), rng.random((12, 14), np.float32)
        matrix, given = of(PackedMatrix("int4", codes, scale, None, (12, 97), (1, 7)))
    else:
        matrix, given = weight((261, 8256), packing, rng)
    x = rng.normal(size=(rows, matrix.shape[1])).astype(np.float32)
    wide, floats = x.astype(np.float64), exact(matrix).astype(np.float64)
    bound = 4 * 2.0**-23 * np.abs(wide) @ np.abs(floats.T)
    assert (np.abs(packed_product(jnp.asarray(x), given) - wide @ floats.T) <= bound).all()


@pytest.mark.parametrize("rows", [512, 520])
@packings
def test_the_gradient_is_the_input_s_and_keeps_the_bytes_alone(packing, rows):
    rng = np.random.default_rng(2)
    matrix, given = weight((rows, 64), packing, rng)
    x = jnp.asarray(rng.normal(size=(3, 7, 64)), jnp.bfloat16)
    y, backward = jax.vjp(lambda x: packed_product(x, given, dtype=jnp.float32), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert kept <= matrix.nbytes
    (gradient,) = backward(y)
    assert gradient.dtype == jnp.bfloat16
    wanted = np.asarray(y, np.float64) @ exact(matrix)
    assert np.abs(np.asarray(gradient, np.float64) - wanted).max() <= 2.0**-8 * np.abs(wanted).max()


@packings
def test_a_mapped_product_is_the_product(packing):
    _, given = weight((32, 64), packing, np.random.default_rng(3))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 64)), jnp.float32)
    mapped = jax.jit(jax.vmap(jax.value_and_grad(lambda row: packed_product(row, given).sum())))(x)
    assert close(mapped[0], packed_product(x, given).sum(-1))
    assert close(mapped[1], jax.grad(lambda x: packed_product(x, given).sum())(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_c", [True, False])
@packings
def test_xla_writes_no_float32_copy_of_a_matrix(packing, dtype, in_c, monkeypatch):
    rng = np.random.default_rng(5)
    if not in_c:
        monkeypatch.setattr("mistral_flax.native.usable", lambda: False)
    jax.clear_caches()  # what was traced with kernels has them
    size, count = 1024, 6
    parts = [weight((size, size), packing, rng) for _ in range(count)]
    matrices = [given for _, given in parts]
    arrays, layout = [matrix[:3] for matrix in matrices], matrices[0][3:]

    def chain(x, arrays):
        for each in arrays:
            x = packed_product(x, PackedWeight(*each, *layout))
        return x

    def written(rows):
        x = jax.ShapeDtypeStruct((rows, size), dtype)
        return jax.jit(chain).lower(x, arrays).compile().memory_analysis().temp_size_in_bytes

    assert written(1) < size * size / 4, "a row is multiplied with the bytes"
    one = size * size * jnp.dtype(dtype).itemsize
    most = 1.5 * one if in_c else one
    assert written(32) < most, "more rows with floats of their own dtype, of one matrix after others or of parts of it"
    if in_c:
        monkeypatch.setattr("mistral_flax.products.FLOATS_BYTES", one // 4)
        jax.clear_caches()
        assert written(32) < one, "of parts of a matrix that is large"
        x = jnp.asarray(rng.normal(size=(32, size)), dtype)
        wide, floats = np.asarray(x, np.float64), exact(parts[0][0]).astype(np.float64)
        away = np.abs(np.asarray(packed_product(x, matrices[0]), np.float64) - wide @ floats.T)
        step = 2.0**-21 if dtype == "float32" else 2.0**-8
        assert (away <= step * np.abs(wide) @ np.abs(floats.T)).all()


# Variables


@packings
def test_what_is_packed_is_no_parameter(packing):
    model = packed(packing)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    held = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, Packed))}
    parts = [name for name, _ in model.packed_parts()]
    assert len(parts) == 7 + (packing == "int4")
    assert names == set(model.params) == set(PARAMETERS) - set(parts)
    assert {name.rpartition(".")[0] for name in held} == {name.removesuffix(".weight") for name in parts}
    assert model.num_parameters() == plain().num_parameters()
    assert model.num_parameters(only_trainable=True) == sum(array.size for array in model.params.values())


@pytest.mark.parametrize(
    "assign",
    [
        lambda part: setattr(part, "weight", 0),
        lambda part: part.weight.set_value(part.weight[...] + 1),
        lambda part: part.weight.__setitem__(..., part.weight[...] + 1),
    ],
)
def test_floats_are_not_written_into_a_packed_matrix(assign):
    model = packed()
    with pytest.raises(UnsupportedFeatureError, match="dequantize"):
        assign(model.model.layers["0"].mlp.up_proj)
    with pytest.raises(UnsupportedFeatureError, match="dequantize"):
        model.set_parameter("model.layers.0.mlp.up_proj.weight", PARAMETERS["model.layers.0.mlp.up_proj.weight"])


def test_an_optimizer_trains_the_rest_and_gradients_pass_through():
    model, floats = packed(), dequantize(packed())
    before = {name: part.matrix.codes.copy() for name, part in model.packed_parts()}
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def gradients(model):
        return nnx.value_and_grad(lambda model: model(IDS, labels=IDS).loss)(model)

    loss, found = gradients(model)
    wanted_loss, wanted = gradients(floats)
    assert close(loss, wanted_loss)
    for path, leaf in nnx.to_flat_state(found):
        assert close(leaf.get_value(), dict(nnx.to_flat_state(wanted))[path].get_value()), path
    optimizer.update(model, found)
    assert gradients(model)[0] < loss
    for name, part in model.packed_parts():
        assert np.array_equal(part.matrix.codes, before[name])


# Graphs


def test_a_packed_model_is_split_merged_cloned_and_bound():
    model = packed()
    wanted = model(IDS).logits
    graph, state = nnx.split(model)
    assert hash(graph) == hash(nnx.graphdef(packed()))
    for again in (nnx.merge(graph, state), nnx.clone(model), model.bind(model.params)):
        assert np.array_equal(again(IDS).logits, wanted)
    doubled = {**model.params, "model.norm.weight": 2 * model.params["model.norm.weight"]}
    assert close(model(IDS, params=doubled).logits, 2 * wanted)
    assert close(dequantize(model)(IDS).logits, wanted)
    assert set(model.params) == set(PARAMETERS)


@pytest.mark.parametrize("size", ["1, 2", "batch, length"])
@packings
def test_a_program_for_a_file_knows_no_kernel(packing, size):
    model = packed(packing)
    forward = jax.jit(lambda params, ids: model(ids, params=params, use_cache=False).logits)
    ids = jax.ShapeDtypeStruct(jax.export.symbolic_shape(size), jnp.int32)
    exported = jax.export.export(forward, platforms=["cpu", "tpu"])(model.params, ids)
    loaded = jax.export.deserialize(exported.serialize())
    ids = jnp.asarray(IDS[:1, :2] if size == "1, 2" else IDS, jnp.int32)
    assert close(loaded.call(model.params, ids), forward(model.params, ids))


def test_models_of_one_packing_share_their_programs():
    engines = [generate.Engine(packed(packing), "auto") for packing in ("int4", "int4", "int8")]
    assert engines[0]._step is engines[1]._step
    assert engines[0]._step is not engines[2]._step


def test_generate_gives_the_same_tokens_compiled_or_not():
    model = packed()
    options = {"max_new_tokens": 4, "do_sample": False}
    plainly = model.generate(IDS, compile="off", **options)
    assert np.array_equal(model.generate(IDS, **options), plainly)
    assert np.array_equal(model.generate(IDS, on_device_loop=True, **options), plainly)


# Layers in one


def test_scanned_layers_stay_packed(tmp_path):
    model = packed(deep=True)
    wanted, parts = model(IDS).logits, dict(model.packed_parts())
    scan_layers(model)
    assert model.model.layers.mlp.up_proj.weight_packed.shape[0] == 2
    assert close(nnx.jit(lambda model: model(IDS).logits)(model), wanted)
    model.gradient_checkpointing_enable()
    embeds = model.get_input_embeddings()(jnp.asarray(IDS))

    def loss(embeds, model):
        return model(inputs_embeds=embeds, labels=IDS).loss

    scanned = jax.jit(jax.grad(loss))(embeds, model)
    model.save_pretrained(tmp_path)
    for name, tensor in model.named_tensors():
        if name in parts:
            assert np.array_equal(tensor.codes, parts[name].matrix.codes)
            assert np.array_equal(tensor.scale, parts[name].matrix.scale)
    with pytest.raises(UnsupportedFeatureError, match="unscan_layers"):
        dequantize(model)
    assert set(model.params) & {"model.layers.mlp.up_proj.weight_packed"} == set()
    unscan_layers(model)
    assert set(model.params) == set(DEEP_PARAMETERS) - set(parts)
    model.gradient_checkpointing_disable()
    assert close(jax.jit(jax.grad(loss))(embeds, model), scanned)
    for name, part in model.packed_parts():
        assert np.array_equal(part.matrix.codes, parts[name].matrix.codes)
    with pytest.warns(UserWarning, match="kept so"):
        assert np.array_equal(MistralForCausalLM.from_pretrained(tmp_path)(IDS).logits, wanted)


@pytest.mark.parametrize("other", ["kinds", "dtypes"])
def test_layers_of_different_packings_are_not_scanned(other):
    asked = Quantization("int4", 16)
    model = quantize(plain(deep=True), asked)
    of_other = packed("nf4", deep=True) if other == "kinds" else quantize(plain(deep=True).load_arrays(HALVES), asked)
    model.model.layers["1"] = of_other.model.layers["1"]
    with pytest.raises(UnsupportedFeatureError, match="dequantize"):
        scan_layers(model)
    assert model(IDS).logits.shape == (*IDS.shape, CONFIG.vocab_size)


# Loading


def test_loading_never_holds_the_floats(tmp_path, monkeypatch):
    plain().save_pretrained(tmp_path)
    before, held = {id(array) for array in jax.live_arrays()}, []

    def watched(model, *arguments, **options):
        put(model, *arguments, **options)
        held.append(sum(array.nbytes for array in jax.live_arrays() if id(array) not in before))

    monkeypatch.setattr("mistral_flax.weights.put", watched)
    model = MistralForCausalLM.from_pretrained(tmp_path, quantization=PACKINGS["int4"])
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert len(held) == len(list(model.packed_parts()))
    assert max(held) <= whole + 4096, "what is packed, and what the model keeps as floats"
    assert np.array_equal(model(IDS).logits, packed()(IDS).logits)


def test_a_model_without_parameters_of_its_own_keeps_what_is_packed(tmp_path):
    packed().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="kept so"):
        model, params = FlaxMistralForCausalLM.from_pretrained(tmp_path, _do_init=False)
    assert np.array_equal(model(IDS, params=params).logits, packed()(IDS).logits)


def test_codes_are_placed_by_a_sharding():
    place = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.P("x", None)
    )
    model, name = packed(), "model.layers.0.mlp.up_proj.weight"
    put(model, name, model._module(name).matrix, device=place)
    part = model.model.layers["0"].mlp.up_proj
    assert part.weight_packed[...].sharding == place == part.weight_scale[...].sharding
