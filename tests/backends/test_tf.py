"""TensorFlow's own ways: tf.function, GradientTape, Keras weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from conformance.weights import random_parameters
from mistral_core.parameters import shapes
from mistral_core.presets import TINY
from mistral_tf import KVCache, MistralForCausalLM

IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 17)).astype(np.int32)
PARAMETERS = random_parameters(TINY, "MistralForCausalLM")


@pytest.fixture(scope="module")
def model():
    return MistralForCausalLM(TINY).load_arrays(PARAMETERS)


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_tf_function(model, jit_compile):
    traced = tf.function(lambda ids, mask: model(ids, mask, labels=ids), jit_compile=jit_compile)
    mask = np.ones_like(IDS)
    mask[0, :4] = 0
    out, plain = traced(tf.constant(IDS), tf.constant(mask)), model(IDS, mask, labels=IDS)
    assert close(out.logits, plain.logits)
    assert close(out.loss, plain.loss)


def test_tf_function_of_any_length_is_traced_once(model):
    spec = tf.TensorSpec([None, None], tf.int32)
    traced = tf.function(lambda ids: model(ids, use_cache=False).logits, input_signature=[spec])
    for length in (3, 17, 9):
        assert close(traced(tf.constant(IDS[:, :length])), model(IDS[:, :length]).logits)
    assert traced.experimental_get_tracing_count() == 1


def test_a_cache_goes_in_and_out_of_tf_function(model):
    step = tf.function(lambda ids, past: model(ids, past_key_values=past))
    past, logits = KVCache.allocate(TINY, 2, 17), []
    for t in range(17):
        out = step(tf.constant(IDS[:, t : t + 1]), past)
        past = out.past_key_values
        logits.append(out.logits)
    assert past.capacity == 17
    assert step.experimental_get_tracing_count() == 1
    assert close(tf.concat(logits, axis=1), model(IDS).logits)


def test_gradient_tape_reaches_every_weight(model):
    with tf.GradientTape() as tape:
        loss = model(IDS, labels=IDS).loss
    gradients = tape.gradient(loss, model.trainable_variables)
    assert len(gradients) == len(shapes(TINY))
    assert all(np.abs(tf.convert_to_tensor(g)).max() > 0 for g in gradients)


def test_weights_have_the_table_s_shapes(model):
    assert sorted(tuple(w.shape) for w in model.weights) == sorted(shapes(TINY).values())


def test_dropout_works_in_training_only():
    model = MistralForCausalLM(TINY.replace(attention_dropout=0.5)).load_arrays(PARAMETERS)
    assert close(model(IDS).logits, model(IDS).logits)
    once, twice = (model(IDS, training=True).logits for _ in range(2))
    assert not close(once, twice)


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
