"""transformers' TensorFlow classes by their names: what its documentation writes, over our numbers."""

from __future__ import annotations

from collections import UserDict

import keras
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import UnsupportedFeatureError
from mistral_tf import (
    MistralForCausalLM,
    TFAutoModel,
    TFAutoModelForCausalLM,
    TFAutoModelForSequenceClassification,
    TFMistralForCausalLM,
    TFMistralForSequenceClassification,
    TFMistralModel,
)

CONFIG = TINY.replace(num_hidden_layers=1)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (4, 9))
MASK = np.ones_like(IDS)
MASK[0, :3] = 0
TOKENS = np.where(MASK == 1, IDS, -100)
NAMES = ("TFMistralModel", "TFMistralForCausalLM", "TFMistralForSequenceClassification")

pytestmark = [
    pytest.mark.feature("transformers 4.x classes: FlaxMistral*, TFMistral*"),
    # Keras reads its variables so when it saves them
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


def make(kind=TFMistralForCausalLM):
    return kind(CONFIG).load_arrays(random_parameters(CONFIG, kind.architecture))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    parameters = random_parameters(CONFIG, "MistralForCausalLM")
    MistralForCausalLM(CONFIG, dtype="bfloat16").load_arrays(parameters).save_pretrained(directory)
    return directory


def close(a, b):
    return np.allclose(np.asarray(a), np.asarray(b), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_our_classes(name, tmp_path):
    theirs, ours = make(getattr(mistral_tf, name)), getattr(mistral_tf, name.removeprefix("TF"))
    assert isinstance(theirs, ours)
    theirs.save_pretrained(tmp_path)
    expected = ours.from_pretrained(tmp_path)(IDS, MASK)
    field = "last_hidden_state" if name == "TFMistralModel" else "logits"
    inputs = {"input_ids": tf.constant(IDS), "attention_mask": tf.constant(MASK)}
    for out in (theirs(IDS, MASK), theirs(inputs), theirs([IDS, MASK], training=False), theirs(**inputs)):
        assert np.array_equal(out[field], expected[field])
    assert np.array_equal(theirs(IDS, MASK, use_cache=False, return_dict=False)[0], expected[field])
    assert theirs.framework == "tf"
    assert theirs.can_generate() == (name == "TFMistralForCausalLM")


def test_weights_load_in_float32_or_the_global_policy(checkpoint):
    model = TFMistralForCausalLM.from_pretrained(checkpoint, from_pt=True)
    assert {v.dtype for v in model.weights} == {"float32"}
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        mixed = TFAutoModelForCausalLM.from_pretrained(checkpoint)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert (mixed.compute_dtype, mixed.variable_dtype) == ("bfloat16", "float32")
    for arguments in ({"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": tf.bfloat16}):
        assert TFMistralForCausalLM.from_pretrained(checkpoint, **arguments).variable_dtype == "bfloat16"
    assert TFMistralForCausalLM.from_pretrained(checkpoint, config=str(checkpoint)).config == model.config


def test_fit_without_a_loss_with_labels_in_the_dictionary():
    model = make()
    model.compile(optimizer=keras.optimizers.Adam(1e-2))  # No loss argument!
    data = {"input_ids": IDS, "attention_mask": MASK, "labels": TOKENS}
    first = float(model(data).loss)
    history = model.fit(tf.data.Dataset.from_tensor_slices(data).batch(4), epochs=4, shuffle=False, verbose=0).history
    assert history["loss"][0] == pytest.approx(first, rel=1e-5)
    assert history["loss"][-1] < first
    out = model.predict(UserDict({"input_ids": IDS, "attention_mask": MASK}), verbose=0)
    assert close(out["logits"], model(IDS, MASK).logits)


def test_compile_takes_their_losses_and_their_order():
    model = make(TFMistralForSequenceClassification)
    encoding, labels = UserDict({"input_ids": IDS, "attention_mask": MASK}), np.array([1, 6, 0, 3])
    own = float(model(**encoding, labels=labels).loss)
    for loss in ("auto", "passthrough", keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        model.compile("sgd", loss, ["accuracy"], None, None, True)
        assert model.run_eagerly
        found = model.evaluate(encoding, labels, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx(own, rel=1e-5)
        assert found["accuracy"] == (np.argmax(model(**encoding).logits, -1) == labels).mean()
    assert model.fit(encoding, labels, verbose=0).history["loss"][0] == pytest.approx(own, rel=1e-5)


def test_generate_and_a_loop_of_calls():
    model = make()
    ids = tf.constant(IDS[1:])
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    past, token = None, ids
    for step in range(6):
        out = model(token, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, tf.argmax(out.logits[:, -1:], -1, tf.int32)
        assert np.array_equal(token[:, 0], generated[:, 9 + step])


def test_embeddings_parameters_and_config():
    model = make()
    assert model.num_parameters(True) == model.num_parameters() == model.count_params()
    assert model.get_input_embeddings().weight.shape == (CONFIG.vocab_size, CONFIG.hidden_size)
    model.resize_token_embeddings(CONFIG.vocab_size + 3)
    assert model.config.vocab_size == CONFIG.vocab_size + 3
    assert model(IDS + 3).logits.shape[-1] == CONFIG.vocab_size + 3
    assert TFMistralForCausalLM.from_config(CONFIG).config == CONFIG


def test_what_scripts_and_servers_ask_a_model_for(checkpoint):
    model = make()
    assert model(model.dummy_inputs).logits.shape == (3, 5, CONFIG.vocab_size)
    assert {name: spec.dtype for name, spec in model.input_signature.items()} == {
        "input_ids": "int32",
        "attention_mask": "int32",
    }
    output = model(IDS, output_hidden_states=True)
    served = model.serving_output(output)
    assert served.keys() == {"logits", "hidden_states"}
    assert served["hidden_states"].shape[0] == CONFIG.num_hidden_layers + 1
    assert model.get_lm_head() is model.get_output_embeddings() is not None
    assert TFMistralModel(CONFIG).get_lm_head() is None
    assert model.get_bias() is None
    assert model.config_class is type(model.config)


def test_saving(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a", False, 1, False, None, "20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert close(TFMistralForCausalLM.from_pretrained(tmp_path / "a")(IDS).logits, model(IDS).logits)
    for refused in ({"saved_model": True}, {"push_to_hub": True}, {"safe_serialization": False}):
        with pytest.raises(UnsupportedFeatureError, match=next(iter(refused))):
            model.save_pretrained(tmp_path / "b", **refused)
    with pytest.raises(UnsupportedFeatureError, match="to_tf_dataset"):
        model.prepare_tf_dataset(None, batch_size=4)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again) is TFMistralForCausalLM
    assert close(again(IDS).logits, model(IDS).logits)


def test_auto_classes(checkpoint):
    with pytest.warns(UserWarning, match="lm_head.weight is not used"):
        assert type(TFAutoModel.from_pretrained(checkpoint)) is TFMistralModel
    with pytest.warns(UserWarning, match="score.weight of"), pytest.warns(UserWarning, match="lm_head.weight"):
        classifier = TFAutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
    assert type(classifier) is TFMistralForSequenceClassification
    assert classifier(IDS).logits.shape == (4, 2)
    assert type(TFAutoModelForCausalLM.from_config(CONFIG)) is TFMistralForCausalLM
    with pytest.raises(UnsupportedFeatureError, match=r"TFAutoModel\.from_pretrained"):
        TFAutoModel()
