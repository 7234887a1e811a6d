"""Packed matrices as Keras and TensorFlow meet them: their weights, policies, files, traces, gradients, training."""

from __future__ import annotations

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.quantization.matrix import dequantised
from mistral_tf import MistralForCausalLM, MistralForSequenceClassification, dequantize, quantize
from mistral_tf.quantize import put

# Keras reads its variables so when it saves them
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]

CONFIG = TINY.replace(num_hidden_layers=1, tie_word_embeddings=False)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9)).astype(np.int32)
SCHEMES = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "group_size": 16, "symmetric": False},
    "nf4": {"quantization": "nf4", "group_size": 16},
}


def make(kind=MistralForCausalLM, *, dtype="float32", **options):
    model = kind(CONFIG, dtype=dtype).load_arrays(random_parameters(CONFIG, kind.architecture))
    return quantize(model, **(options or SCHEMES["int8"]))


def logits(model, ids=IDS):
    return np.asarray(model(ids, use_cache=False).logits)


def same_bits(a, b):
    ours, theirs = dict(a.packed_parts()), dict(b.packed_parts())
    assert ours
    assert list(ours) == list(theirs)
    for name, part in ours.items():
        one, other = part.matrix, theirs[name].matrix
        assert (one.kind, one.shape, one.block) == (other.kind, other.shape, other.block)
        for x, y in zip(one[1:4], other[1:4], strict=True):
            assert (x is None) == (y is None)
            assert x is None or (x.dtype == y.dtype and x.tobytes() == y.tobytes()), name
    return all(x.tobytes() == y.tobytes() for (_, x), (_, y) in zip(a.named_arrays(), b.named_arrays(), strict=True))


# Weights and policies


def test_packed_weights_are_keras_weights_that_are_not_trained():
    plain = MistralForCausalLM(CONFIG, dtype="float32")
    order = [layer.name for layer in plain._flatten_layers(include_self=False)]
    model = make(**SCHEMES["int4"])
    assert [layer.name for layer in model._flatten_layers(include_self=False)] == order
    packed = {id(weight) for _, part in model.packed_parts() for weight in part.weights}
    assert len(packed) == 7 * 3 + 2  # codes, scales, zero points; of the head no zero points
    assert packed == {id(weight) for weight in model.non_trainable_weights}
    assert {weight.dtype for weight in model.non_trainable_weights} == {"uint8", "int8", "float32"}
    assert len(model.trainable_weights) == 1 + 2 + 1
    put(plain, "model.layers.0.self_attn.k_proj.weight", model.model.decoder_layers[0].self_attn.k_proj.matrix)
    assert [layer.name for layer in plain._flatten_layers(include_self=False)] == order
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(only_trainable=True) == sum(np.size(weight) for weight in model.trainable_weights)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_no_policy_casts_scales(policy):
    model = make(dtype=policy, **SCHEMES["nf4"])
    seen = []
    part = model.model.decoder_layers[0].self_attn.q_proj
    product = mistral_tf.products.packed_product
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(type(part).call.__globals__, "packed_product", lambda x, weight, dtype=None: (
            seen.append((x.dtype.name, weight.scale.dtype.name)) or product(x, weight, dtype=dtype)
        ))  # fmt: skip
        outer = keras.Sequential([keras.layers.Lambda(lambda ids: model(ids, use_cache=False).logits)])
        outer.dtype_policy = keras.DTypePolicy("mixed_float16")
        outer(IDS)
    assert set(seen) == {(model.compute_dtype, "float32")}
    assert part.matrix.scale.dtype == np.float32
    floats = dequantize(make(dtype=policy, **SCHEMES["nf4"]))
    assert {weight.dtype for weight in floats.weights} == {model.variable_dtype}
    gap = np.abs(logits(model) - logits(floats)).max()
    assert gap <= 4 * 2.0 ** (-8 if policy != "mixed_float16" else -11) * np.abs(logits(floats)).max()


def test_a_packed_weight_is_not_assigned_to():
    model = make()
    part, count = model.model.decoder_layers[0].mlp.up_proj, len(model.weights)
    with pytest.raises(UnsupportedFeatureError, match="call mistral_tf.dequantize"):
        part.weight = keras.Variable(np.zeros(part.shape, np.float32))
    with pytest.raises(UnsupportedFeatureError, match="call dequantize"):
        model.set_parameter("model.layers.0.mlp.up_proj.weight", np.zeros((2, 2), np.float32))
    assert len(model.weights) == count
    assert "int8" in repr(part)


# Files


def checkpoint(model, folder):
    other = type(model).from_config(model.get_config())
    path = tf.train.Checkpoint(model=model).save(folder / "kept")
    status = tf.train.Checkpoint(model=other).restore(path)
    status.assert_consumed()
    status.assert_existing_objects_matched()
    return other


def keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def weights_file(model, folder):
    other = type(model).from_config(model.get_config())
    model.save_weights(folder / "model.weights.h5")
    other.load_weights(folder / "model.weights.h5")
    return other


def clone(model, folder):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


def deep_copy(model, folder):
    return copy.deepcopy(model)


@pytest.mark.parametrize(
    ("way", "scheme"),
    [*((way, "int4") for way in (checkpoint, keras_file, weights_file, clone, deep_copy)), (keras_file, "int8"),
     (checkpoint, "nf4")],
)  # fmt: skip
def test_every_bit_comes_back(way, scheme, tmp_path):
    model = make(dtype="bfloat16", **SCHEMES[scheme])
    other = way(model, tmp_path)
    assert same_bits(model, other)
    assert logits(other).dtype == np.float32
    assert np.array_equal(logits(model), logits(other))
    assert [layer.name for layer in other._flatten_layers()] == [layer.name for layer in model._flatten_layers()]


def test_a_copy_of_a_config_has_fresh_floats_beside_packed_zeros():
    model = make()
    other = MistralForCausalLM.from_config(model.get_config())
    embedding = other._array("model.embed_tokens.weight")
    assert embedding.std() == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert all(not np.any(part.weight) for _, part in other.packed_parts())
    assert np.array_equal(other._array("model.norm.weight"), np.ones(CONFIG.hidden_size))


def test_a_saved_model_serves_the_same_logits(tmp_path):
    model = make(**SCHEMES["int4"])
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    inputs = {"input_ids": tf.constant(IDS), "attention_mask": tf.ones_like(IDS)}
    assert np.allclose(served.serve(inputs)["logits"], logits(model), atol=1e-5)
    kept = {variable.dtype.name for variable in served.variables if variable.shape == model.lm_head.weight_packed.shape}
    assert kept == {"float32", "int8"}  # the embedding and the head
    assert sum(np.asarray(v).nbytes for v in served.variables) == sum(np.asarray(w).nbytes for w in model.weights)


# Traces


def test_what_was_traced_before_is_traced_anew():
    model = MistralForCausalLM(CONFIG, dtype="float32").load_arrays(random_parameters(CONFIG))
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    model.generate(IDS, **options)
    model.predict(IDS, verbose=0)
    quantize(model, "int4", group_size=16)
    expected = logits(model)
    assert np.allclose(model.predict(IDS, verbose=0).logits, expected, atol=1e-5)
    found = model.generate(IDS, **options)
    assert np.allclose(found.logits[0], expected[:, -1], atol=1e-5)


def test_generate_compiled_or_not_and_in_one_loop():
    model = make(**SCHEMES["int4"])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], compile="off", **options)
    assert np.array_equal(model.generate(IDS[:1], **options), expected)
    assert np.array_equal(model.generate(IDS[:1], on_device_loop=True, **options), expected)


def test_packed_steps_are_not_compiled_as_a_whole(monkeypatch):
    monkeypatch.setattr("mistral_tf.generate._is_float32_on_cpu", lambda model: True)
    from mistral_tf.generate import _traced

    model = make()
    assert [step._jit_compile for step in _traced(model)] == [None, None, None]
    assert _traced(dequantize(model))[1]._jit_compile is True


# Gradients and training


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("scheme", "compiled"), [("int8", None), ("int4", False), ("int4", True), ("nf4", True)])
def test_gradients_of_inputs_are_those_of_the_floats(scheme, compiled, rows):
    part = make(**SCHEMES[scheme]).model.decoder_layers[0].mlp.down_proj
    x = tf.constant(np.random.default_rng(1).normal(size=(rows, part.in_features)), tf.float32)
    upstream = tf.constant(np.random.default_rng(2).normal(size=(rows, part.out_features)), tf.float32)

    def gradient(x, product):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(product(x) * upstream)
        return loss, tape.gradient(loss, x)

    def packed(x):
        return gradient(x, part)

    call = packed if compiled is None else tf.function(packed, jit_compile=compiled)
    weight = tf.constant(dequantised(part.matrix))
    for found, wanted in zip(call(x), gradient(x, lambda x: tf.matmul(x, weight, transpose_b=True)), strict=True):
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("policy", "checkpointed"), [("float32", True), ("mixed_bfloat16", False)])
def test_fit_trains_a_head_over_a_packed_body(policy, checkpointed):
    model = make(MistralForSequenceClassification, dtype=policy, **SCHEMES["nf4"])
    before = {name: part.matrix for name, part in model.packed_parts()}
    norm = model._array("model.norm.weight")
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.compile(keras.optimizers.Adam(1e-2))
    history = model.fit(IDS, np.array([0, 1]), epochs=6, verbose=0).history["loss"]
    assert history[-1] < history[0] / 2
    assert not np.array_equal(model._array("model.norm.weight"), norm)
    for name, part in model.packed_parts():
        assert part.matrix.codes.tobytes() == before[name].codes.tobytes()
        assert part.matrix.scale.tobytes() == before[name].scale.tobytes()


def test_a_packed_model_s_gradients_are_those_of_its_floats():
    model = make(**SCHEMES["int4"])
    floats = dequantize(make(**SCHEMES["int4"]))

    def gradients(model):
        with tf.GradientTape() as tape:
            loss = model(IDS, labels=IDS).loss
        wanted = [model.model.embed_tokens.weight, model.model.norm.weight]
        return tape.gradient(loss, [weight.value for weight in wanted])

    for found, wanted in zip(gradients(model), gradients(floats), strict=True):
        found, wanted = (tf.convert_to_tensor(each) for each in (found, wanted))
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_frozen_layer_stays_frozen():
    model = MistralForCausalLM(CONFIG, dtype="float32")
    model.model.decoder_layers[0].mlp.up_proj.trainable = False
    dequantize(quantize(model))
    assert [layer.name for layer in model._flatten_layers() if not layer.trainable] == ["model.layers.0.mlp.up_proj"]
