"""TensorFlow's own ways: tf.function, GradientTape, Keras weights."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import ConfigError, InputError
from mistral_core.parameters import shapes
from mistral_core.training import TrainingSettings
from mistral_tf import KVCache, MistralForCausalLM
from mistral_tf.attention import Visibility, attend
from mistral_tf.generate import _compiled
from mistral_tf.train import Learner

CONFIG = TINY.replace(num_hidden_layers=1)
DEEP = TINY.replace(num_hidden_layers=2)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 17)).astype(np.int32)
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.feature("Compiled forward pass")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_tf_function(model, jit_compile):
    traced = tf.function(lambda ids, mask: model(ids, mask, labels=ids), jit_compile=jit_compile)
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    out, plain = traced(tf.constant(IDS), tf.constant(mask)), model(IDS, mask, labels=IDS)
    assert close(out.logits, plain.logits)
    assert close(out.loss, plain.loss)


@pytest.mark.feature("Compiled forward pass")
def test_tf_function_of_any_length_is_traced_once(model):
    spec = tf.TensorSpec([None, None], tf.int32)
    traced = tf.function(lambda ids: model(ids, use_cache=False).logits, input_signature=[spec])
    for length in (3, 17, 9):
        assert close(traced(tf.constant(IDS[:, :length])), model(IDS[:, :length]).logits)
    assert traced.experimental_get_tracing_count() == 1


@pytest.fixture
def autograph(monkeypatch):
    """What AutoGraph is set to wherever a language model is traced."""
    seen, call = set(), MistralForCausalLM.call

    @functools.wraps(call)  # Keras reads its arguments
    def told(self, *arguments, **given):
        if tf.inside_function():
            seen.add(tf.__internal__.autograph.control_status_ctx().status.name)
        return call(self, *arguments, **given)

    monkeypatch.setattr(MistralForCausalLM, "call", told)
    return seen


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}, {"on_device_loop": True}])
def test_text_is_traced_as_it_is_written(options, autograph):
    """AutoGraph would write the source of all that is called anew first, which takes longer than to trace it."""
    MistralForCausalLM(CONFIG).generate(IDS, max_new_tokens=3, eos_token_id=None, compile="on", **options)
    assert autograph == {"DISABLED"}


@pytest.mark.parametrize("measured", [False, True])
def test_a_trained_step_is_traced_as_it_is_written(measured, autograph):
    learner = Learner(MistralForCausalLM(CONFIG), TrainingSettings(rate=1e-3))
    rows = {"input_ids": IDS, "labels": IDS}
    learner.measure(rows) if measured else learner.step([rows], items=IDS.size, rate=1e-3, number=0)
    assert autograph == {"DISABLED"}


def test_a_short_text_does_not_wait_for_xla():
    """What is read once is traced; XLA may compile what runs again: a token, and guesses."""
    model, ids = MistralForCausalLM(CONFIG), np.tile(IDS[:1, :4], 3)

    def counts(**options):
        model.generate(ids, eos_token_id=None, compile="on", **options)
        return [each.experimental_get_tracing_count() for each in _compiled[model]]

    assert counts(max_new_tokens=1) == [1, 0, 0]
    assert counts(max_new_tokens=4) == [1, 1, 0]
    assert counts(max_new_tokens=4, prompt_lookup_num_tokens=2) == [1, 2, 0]


@pytest.mark.feature("Cache in a compiled step")
def test_a_cache_goes_in_and_out_of_tf_function(model):
    step = tf.function(lambda ids, past: model(ids, past_key_values=past))
    past, logits = KVCache.allocate(CONFIG, 2, 17), []
    for t in range(17):
        out = step(tf.constant(IDS[:, t : t + 1]), past)
        past = out.past_key_values
        logits.append(out.logits)
    assert past.capacity == 17
    assert step.experimental_get_tracing_count() == 1
    assert close(tf.concat(logits, axis=1), model(IDS).logits)


@pytest.mark.feature("Training step")
def test_gradient_tape_reaches_every_weight(model):
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS).loss
    gradients = tape.gradient(loss, model.trainable_variables)
    assert len(gradients) == len(shapes(CONFIG))
    assert all(np.abs(tf.convert_to_tensor(g)).max() > 0 for g in gradients)


def test_weights_have_the_table_s_shapes(model):
    assert sorted(tuple(w.shape) for w in model.weights) == sorted(shapes(CONFIG).values())


@pytest.mark.feature("Attention dropout in training")
def test_dropout_works_in_training_only():
    model = MistralForCausalLM(CONFIG.replace(attention_dropout=0.5)).load_arrays(PARAMETERS)
    assert close(model(IDS).logits, model(IDS).logits)
    once, twice = (model(IDS, training=True).logits for _ in range(2))
    assert not close(once, twice)


# Precision


@pytest.mark.feature("Mixed precision")
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_policies_keep_their_variables_and_give_float32_logits(model, policy):
    low = MistralForCausalLM(CONFIG, dtype=policy).load_arrays(PARAMETERS)
    variables = "float32" if policy.startswith("mixed") else policy
    assert {v.dtype for v in low.weights} == {variables}
    out = low(IDS, output_hidden_states=True)
    assert {state.dtype.name for state in out.hidden_states} == {policy.removeprefix("mixed_")}
    assert out.logits.dtype == tf.float32
    exact = model(IDS).logits
    eps = 2**-10 if policy.endswith("_float16") or policy == "float16" else 2**-7
    assert 0 < np.abs(out.logits - exact).max() < 8 * eps * np.abs(exact).max()


@pytest.mark.feature("Mixed precision")
def test_the_global_policy_is_the_default_and_float16_scales_its_loss():
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = MistralForCausalLM(CONFIG)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.dtype_policy.name == model.model.decoder_layers[0].mlp.up_proj.dtype_policy.name == "mixed_float16"
    model.compile(keras.optimizers.Adam(1e-2))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    losses = model.fit(IDS, IDS, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert MistralForCausalLM(CONFIG).dtype_policy.name == "float32"


# Training


@pytest.mark.feature("Training step")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_training_loop_of_one_s_own(jit_compile):
    model = MistralForCausalLM(CONFIG).load_arrays(PARAMETERS)
    optimizer = keras.optimizers.Adam(1e-2)
    weights = model.trainable_variables
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile)
    def step(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    losses = [float(step(tf.constant(IDS))) for _ in range(8)]
    assert losses[-1] < losses[0] / 2


def gradients_of(model, *, compiled=False, seed=0):
    """Loss and gradients in training, under a seed."""

    def run(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return [loss, *map(tf.convert_to_tensor, tape.gradient(loss, model.trainable_variables))]

    tf.random.set_seed(seed)
    return (tf.function(run) if compiled else run)(tf.constant(IDS))


@pytest.mark.feature("Gradient checkpointing")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_gradients_are_the_same(compiled, dropout):
    model = MistralForCausalLM(DEEP.replace(attention_dropout=dropout)).load_arrays(PARAMETERS)
    plain = gradients_of(model, compiled=compiled)
    model.gradient_checkpointing_enable()
    recomputed = gradients_of(model, compiled=compiled)
    model.gradient_checkpointing_disable()
    assert all(close(a, b) for a, b in zip(plain, recomputed, strict=True))
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.feature("Gradient checkpointing")
def test_layers_are_computed_again_for_their_gradients():
    def products(checkpointing):
        model = MistralForCausalLM(DEEP)
        if checkpointing:
            model.gradient_checkpointing_enable()
        graph = tf.function(lambda ids: gradients(model, ids)).get_concrete_function(tf.constant(IDS)).graph
        return sum(
            node.op == "Softmax"
            for function in [graph.as_graph_def(), *graph.as_graph_def().library.function]
            for node in getattr(function, "node", None) or function.node_def
        )

    def gradients(model, ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return tape.gradient(loss, model.trainable_variables)

    assert products(False) == DEEP.num_hidden_layers
    assert products(True) == 2 * DEEP.num_hidden_layers


@pytest.mark.feature("Attention dropout in training")
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_follows_the_seed(compiled):
    model = MistralForCausalLM(CONFIG.replace(attention_dropout=0.5)).load_arrays(PARAMETERS)
    once, again, other = (gradients_of(model, compiled=compiled, seed=seed)[0] for seed in (1, 1, 2))
    assert once == again
    assert once != other


@pytest.mark.feature("Attention dropout in training")
def test_dropout_drops_that_share_and_scales_the_rest():
    config = CONFIG.replace(attention_dropout=0.25)
    q = k = np.zeros([1, 64, 1, 64], np.float32)
    order = tf.range(64)[None]
    v = tf.eye(64, batch_shape=[1])[:, :, None]  # the output is then the weights
    tf.random.set_seed(0)
    visibility = Visibility(order * 0 + 63, order)
    out, _ = attend(q, k, v, visibility, dropout=config.attention_dropout, seed=tf.constant([1, 2]))
    weights = out.numpy().reshape(64, 64)
    kept = weights > 0
    assert np.allclose(weights[kept], 1 / 64 / 0.75)
    assert abs(kept.mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 64**2)


@pytest.mark.feature("Device placement")
def test_a_device_is_asked_for_by_name(tmp_path, model):
    model.save_pretrained(tmp_path)
    for device in ("cpu", "CPU:0", "/device:CPU:0", "auto"):
        assert MistralForCausalLM.from_pretrained(tmp_path, device=device).device.endswith("CPU:0")
    assert MistralForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).device.endswith("CPU:0")
    with pytest.raises(ConfigError, match="GPU:9"):
        MistralForCausalLM.from_pretrained(tmp_path, device="GPU:9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([IDS, None, None, ((IDS, IDS),)], "must be a KVCache"),
        ([IDS, None, None, None, None, True, 1], "too many positional"),
        ([[IDS, IDS, IDS, IDS, IDS, IDS, IDS]], "too many positional"),
        ([{"input_ids": IDS, "entity_ids": IDS}], "entity_ids"),
        ([tf.ragged.constant([[1, 2], [3]])], "rows of different lengths"),
    ],
)
def test_mistakes_in_a_call_are_told(model, arguments, message):
    with pytest.raises((InputError, TypeError), match=message):
        model(*arguments)


def test_one_dictionary_or_list_is_all_arguments(model):
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    expected = model(IDS, mask).logits
    for given in ({"input_ids": IDS, "attention_mask": mask}, [IDS, mask], (tf.constant(IDS), tf.constant(mask))):
        assert close(model(given).logits, expected)
    assert close(model(IDS.tolist(), mask.tolist()).logits, expected)


def test_another_keras_backend_is_refused_with_advice():
    result = subprocess.run(
        [sys.executable, "-c", "import mistral_tf"],
        env={**os.environ, "KERAS_BACKEND": "numpy"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "KERAS_BACKEND=tensorflow" in result.stderr
