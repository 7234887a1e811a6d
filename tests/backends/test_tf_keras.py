"""Our models as Keras models: the functional API, parts used alone, copies, saving, exporting, resizing."""

from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import InputError, UnsupportedFeatureError
from mistral_core.parameters import shapes
from mistral_tf import (
    AutoModelForCausalLM,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from mistral_tf.layers import MLP, Attention, Linear, RMSNorm, rotary
from mistral_tf.step import Step

# Keras reads its variables so when it saves them
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

CONFIG = TINY.replace(num_hidden_layers=1)
DEEP = TINY.replace(num_hidden_layers=2)
B, T = 3, 9
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (B, T)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[0, :3] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
CLASSES = np.array([1, 6, 0], np.int32)
HEADS = ("MistralModel", "MistralForCausalLM", "MistralForSequenceClassification", "MistralForTokenClassification",
         "MistralForQuestionAnswering")  # fmt: skip


def make(kind=MistralForCausalLM, config=CONFIG, **options):
    return kind(config, **options).load_arrays(random_parameters(config, kind.architecture))


def close(a, b, atol=2e-5):
    return np.allclose(np.asarray(a), np.asarray(b), atol=atol)


def in_fresh_process(code, **values):
    """Run code that knows these values, and whose warnings are errors."""
    lines = [f"{name} = {value!r}" for name, value in values.items()]
    command = [sys.executable, "-W", "error::UserWarning", "-c", "\n".join([*lines, code])]
    run = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def symbols():
    return [keras.Input([None], dtype="int32", name=name) for name in ("input_ids", "attention_mask")]


@pytest.mark.feature("Functional API")
def test_the_body_in_a_functional_model_trains_and_is_saved(tmp_path):
    ids, mask = symbols()
    body = make(MistralModel)
    out = body(ids, attention_mask=mask, output_hidden_states=True)
    embedded = keras.Model([ids, mask], out.hidden_states[0])
    assert close(embedded([IDS, MASK]), np.asarray(body.embed_tokens.weight)[IDS])
    scores = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(out.last_hidden_state))
    model = keras.Model([ids, mask], scores)
    assert close(model([IDS, MASK]), model.predict([IDS, MASK], verbose=0))
    pooled = body(IDS, MASK).last_hidden_state.numpy().mean(1)
    assert close(model([IDS, MASK]), pooled @ np.asarray(model.layers[-1].kernel))
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit([IDS, MASK], CLASSES % 3, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    assert close(keras.models.load_model(tmp_path / "model.keras")([IDS, MASK]), model([IDS, MASK]))


@pytest.mark.feature("Functional API")
@pytest.mark.parametrize("head", HEADS[1:])
def test_heads_in_a_functional_model(head, tmp_path):
    ids, mask = symbols()
    body = make(getattr(mistral_tf, head))
    fields = ("start_logits", "end_logits") if head == "MistralForQuestionAnswering" else ("logits",)
    output = body({"input_ids": ids, "attention_mask": mask})
    model = keras.Model({"input_ids": ids, "attention_mask": mask}, {name: output[name] for name in fields})
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = body(IDS, MASK)
    for name in fields:
        assert close(model(INPUTS)[name], expected[name])
        assert close(again(INPUTS)[name], expected[name])
    assert output.loss is None
    assert model.count_params() == body.num_parameters()


@pytest.mark.feature("Functional API")
def test_symbolic_outputs_are_those_asked_for():
    ids, _ = symbols()
    asking = make(MistralForCausalLM, DEEP.replace(output_hidden_states=True))
    out = asking(ids, labels=ids, output_hidden_states=None, output_attentions=True)
    assert [len(out.hidden_states), len(out.attentions), out.loss.shape, out.past_key_values] == [3, 2, (), None]
    everything = keras.Model(ids, {"loss": out.loss, "last": out.hidden_states[2], "seen": out.attentions[1]})(IDS)
    expected = asking(IDS, labels=IDS, output_attentions=True)
    assert close(everything["loss"], expected.loss)
    assert close(everything["last"], expected.hidden_states[2])
    assert close(everything["seen"], expected.attentions[1])
    logits, states = asking(ids, return_dict=False)
    assert (logits.shape, len(states)) == ((None, None, CONFIG.vocab_size), 3)
    embeds = keras.Input([None, CONFIG.hidden_size])
    from_embeds = keras.Model(embeds, asking(inputs_embeds=embeds).logits)
    assert close(from_embeds(tf.gather(asking.model.embed_tokens.weight, IDS)), expected.logits)


@pytest.mark.feature("Layers used alone")
def test_parts_are_keras_layers():
    x = np.random.default_rng(1).normal(size=(B, T, CONFIG.hidden_size)).astype(np.float32)
    norm = RMSNorm(CONFIG.hidden_size, 1e-5, dtype="float32")
    assert close(norm(x), x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5))
    assert close(Linear(CONFIG.hidden_size, 5, dtype="float32", initializer="ones")(x), x.sum(-1, keepdims=True), 1e-4)
    mlp = MLP(CONFIG, dtype="float32", initializer="glorot_uniform")
    inputs = keras.Input([None, CONFIG.hidden_size])
    model = keras.Model(inputs, keras.layers.Dense(2)(norm(mlp(inputs))))
    model.compile("adam", "mse")
    model.fit(x, x[..., :2], verbose=0)
    assert model.count_params() == sum(map(np.size, mlp.weights)) + CONFIG.hidden_size + 2 * CONFIG.hidden_size + 2
    attention = Attention(CONFIG, 5, None, dtype="float32", initializer="glorot_uniform")
    order = tf.broadcast_to(tf.range(T), [B, T])
    out, weights, kept = attention(x, step=Step(rotary(order, CONFIG), order))
    assert out.shape == x.shape
    assert weights.shape == (B, CONFIG.num_attention_heads, T, T)
    assert kept is None


@pytest.mark.feature("Saving in the framework's own format")
def test_weights_h5(tmp_path):
    model = make()
    model.save_weights(tmp_path / "a.weights.h5")
    other = MistralForCausalLM(CONFIG)
    other.load_weights(tmp_path / "a.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))
    with pytest.raises(ValueError, match="embed_tokens"):
        MistralForCausalLM(CONFIG.replace(vocab_size=50)).load_weights(tmp_path / "a.weights.h5")


LOAD = """
import keras, numpy as np
import mistral_tf
model = keras.models.load_model(path)  # safe mode
assert type(model).__name__ == "MistralForSequenceClassification"
given = np.load(data)
out = model(given["ids"], given["mask"])
assert np.allclose(out.logits, given["logits"], atol=1e-6)
assert [v.name for v in model.trainable_variables] == list(given["trained"])
assert model.optimizer.iterations == 2
history = model.fit({"input_ids": given["ids"], "attention_mask": given["mask"]}, given["labels"], epochs=2, verbose=0)
assert np.allclose(history.history["loss"], given["losses"], rtol=1e-4), history.history
assert np.allclose(history.history["accuracy"], given["accuracy"])
assert np.allclose(history.history["sparse_categorical_crossentropy"], given["losses"], rtol=1e-4)
"""


@pytest.mark.feature("Saving in the framework's own format")
def test_a_compiled_frozen_model_goes_on_in_another_process(tmp_path):
    metrics = ["accuracy", "sparse_categorical_crossentropy"]
    model = make(MistralForSequenceClassification)
    model.model.decoder_layers[0].trainable = False
    model.compile(keras.optimizers.Adam(1e-2), metrics=metrics)
    model.fit(INPUTS, CLASSES, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    logits = model(**INPUTS).logits
    history = model.fit(INPUTS, CLASSES, epochs=2, verbose=0).history
    np.savez(
        tmp_path / "data.npz",
        ids=IDS,
        mask=MASK,
        labels=CLASSES,
        logits=logits,
        losses=history["loss"],
        accuracy=history["accuracy"],
        trained=[v.name for v in model.trainable_variables],
    )
    in_fresh_process(LOAD, path=str(tmp_path / "model.keras"), data=str(tmp_path / "data.npz"))


@pytest.mark.feature("Saving in the framework's own format")
@pytest.mark.parametrize("head", HEADS)
def test_config_clone_and_keras_file_of_every_class(head, tmp_path):
    kind = getattr(mistral_tf, head)
    config = DEEP.replace(tie_word_embeddings=True, num_labels=3)
    model = make(kind, config, dtype="mixed_bfloat16", name="mine")
    model.generation_config = model.generation_config.replace(max_new_tokens=7)
    clone = keras.models.clone_model(model)
    for copy in (clone, kind.from_config(model.get_config())):
        assert type(copy) is kind
        assert (copy.name, copy.dtype_policy.name) == ("mine", "mixed_bfloat16")
        assert copy.config == model.config
        assert copy.generation_config == model.generation_config
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), again.get_weights(), strict=True))
    assert len(again.weights) == len(shapes(config, head))


def test_variables_have_the_checkpoint_s_names_and_paths_of_their_own():
    model = make(config=DEEP)
    assert {v.name: tuple(v.shape) for v in model.variables} == shapes(DEEP)
    model.compile()
    state = model.get_state_tree(value_format="numpy_array")  # Keras refuses a path that comes twice
    assert len(state["trainable_variables"]) == len(shapes(DEEP))


def test_a_class_of_one_s_own_is_still_a_mistral(tmp_path):
    class Mine(MistralForTokenClassification):
        pass

    model = make(Mine)
    model.save_pretrained(tmp_path)
    assert close(Mine.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    assert Mine.from_pretrained(tmp_path).config == MistralForTokenClassification.from_pretrained(tmp_path).config


def test_summary_counts_every_parameter_once():
    lines = []
    for config in (DEEP, DEEP.replace(tie_word_embeddings=True)):
        model = MistralForCausalLM(config)
        model.model.trainable = False
        model.summary(print_fn=lines.append, line_length=120)
        total = f"Total params: {model.num_parameters():,}"
        assert total in lines[-1]
        assert f"Trainable params: {model.num_parameters(only_trainable=True):,}" in lines[-1]
        assert model.num_parameters() == model.count_params() == sum(map(np.prod, shapes(config).values()))


EXPORTED = """
import numpy as np, sys
import tensorflow as tf
given = np.load(data)
inputs = {"input_ids": tf.constant(given["ids"]), "attention_mask": tf.constant(given["mask"])}
served = tf.saved_model.load(path)
assert np.allclose(served.serve(inputs)["logits"], given["logits"], atol=2e-5)
assert "mistral_tf" not in sys.modules
"""


@pytest.mark.feature("Export")
def test_export_serves_any_length_either_integer_and_without_this_package(tmp_path):
    model = make()
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    layer = keras.layers.TFSMLayer(str(tmp_path / "served"), call_endpoint="serve")
    for length, *dtypes in ((1, "int32", "int32"), (4, "int64", "int32"), (4, "int32", "int64"), (T, "int64", "int64")):
        inputs = {
            name: tf.constant(array[1:, -length:], dtype)
            for (name, array), dtype in zip(INPUTS.items(), dtypes, strict=True)
        }
        assert close(served.serve(inputs)["logits"], model(**inputs).logits)
        assert close(layer(inputs)["logits"], model(**inputs).logits)
    for signature, dtype in (("serving_default", "int32"), ("int64_serving", "int64")):
        inputs = {name: tf.constant(array, dtype) for name, array in INPUTS.items()}
        assert close(served.signatures[signature](**inputs)["logits"], model(**INPUTS).logits)
    with pytest.raises(UnsupportedFeatureError, match="tf_saved_model"):
        model.export(tmp_path / "other", format="onnx")
    np.savez(tmp_path / "data.npz", ids=IDS, mask=MASK, logits=model(**INPUTS).logits)
    in_fresh_process(EXPORTED, path=str(tmp_path / "served"), data=str(tmp_path / "data.npz"))


@pytest.mark.feature("Export")
def test_export_of_one_s_own_signature(tmp_path):
    model = make(MistralForSequenceClassification, CONFIG.replace(output_hidden_states=True))
    signature = {"input_ids": keras.InputSpec("int32", [B, T], name="input_ids")}
    model.export(tmp_path / "served", input_signature=signature, verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    for dtype in ("int32", "int64"):
        out = served.serve({"input_ids": tf.constant(IDS, dtype)})
        assert close(out["logits"], model(IDS).logits)
        assert close(out["hidden_states"], model(IDS).hidden_states)


@pytest.mark.feature("Resize token embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_resized_models_train_and_are_saved(tied, tmp_path):
    model = make(config=CONFIG.replace(tie_word_embeddings=tied))
    before = model(IDS).logits
    embedding = model.resize_token_embeddings(100)
    assert embedding is model.get_input_embeddings()
    assert close(model(IDS).logits[..., : CONFIG.vocab_size], before)
    assert {v.name: tuple(v.shape) for v in model.variables} == shapes(model.config)
    assert model.count_params() == sum(map(np.prod, shapes(model.config).values()))
    model.compile(keras.optimizers.Adam(1e-2))
    new = np.full_like(IDS, 99)
    losses = model.fit(new, new, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    assert close(keras.models.load_model(tmp_path / "model.keras")(new).logits, model(new).logits)


@pytest.mark.feature("AutoModelFor*, AutoTokenizer, AutoConfig")
def test_auto_classes(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    fresh = AutoModelForCausalLM.from_config(CONFIG, dtype="mixed_bfloat16", device="cpu", sliding_window=3)
    assert (type(fresh), fresh.config.sliding_window) == (MistralForCausalLM, 3)
    assert fresh.dtype_policy.name == "mixed_bfloat16"
    assert fresh.device.endswith("CPU:0")


@pytest.mark.feature("Resize token embeddings")
@pytest.mark.parametrize(
    "change", [lambda m: m.resize_token_embeddings(60), lambda m: setattr(m.config, "rope_theta", 50.0)]
)
def test_what_keras_traced_follows_a_changed_model(change):
    model = MistralForCausalLM(CONFIG)
    model.compile("sgd")
    ids = np.arange(3, 21).reshape(2, 9)
    model.predict(ids, verbose=0)
    model.evaluate(ids, ids, verbose=0)
    change(model)
    assert np.allclose(model.predict(ids, verbose=0).logits, model(ids).logits, atol=1e-5)
    assert model.evaluate(ids, ids, verbose=0) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)


def test_keras_leaves_our_errors_what_they_are():
    model = MistralForCausalLM(CONFIG)
    with pytest.raises(InputError) as found:
        model(IDS, past_key_values=((1, 2), (3, 4)))
    assert str(found.value).startswith(
        "past_key_values must be a KVCache, as KVCache.allocate or a call returns it, got tuple"
    )
