"""Adapters in Keras' own idiom: fit, policies, Keras' and TensorFlow's files, checkpointed layers that drop."""

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
from mistral_tf import lora

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

CONFIG = TINY.replace(num_hidden_layers=2, layer_types=None)
IDS = np.arange(3, 23).reshape(2, 10)
FIELDS = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "v_proj", "embed_tokens"]}


def make(dtype="float32"):
    model = mistral_tf.MistralForCausalLM(CONFIG, dtype=dtype, attn_implementation="eager")
    arrays = random_parameters(CONFIG)
    return model.load_arrays({name: array.astype(model.variable_dtype) for name, array in arrays.items()})


def adapted(dtype="float32", **fields):
    asked = lora.LoraConfig(**{**FIELDS, "init_lora_weights": False, **fields})
    return lora.add_adapter(make(dtype), asked)


def logits(model, **options):
    return model(IDS, **options).logits.numpy()


def compiled(model):
    model.compile(keras.optimizers.AdamW(1e-2))
    return model


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fit_trains_the_adapter_alone_and_generate_uses_it(policy):
    model = lora.add_adapter(make(policy), lora.LoraConfig(**FIELDS, lora_dropout=0.25))
    if policy == "float32":
        model.gradient_checkpointing_enable()
    base, text = dict(model.named_arrays()), model.generate(IDS, max_new_tokens=3, eos_token_id=None).numpy()
    assert len(model.trainable_variables) == 2 * 3 * 2 + 2
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    losses = compiled(model).fit(IDS, IDS, epochs=6, batch_size=2, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.array_equal(array, base[name]) for name, array in model.named_arrays())
    found = lora.adapter_of(model)
    changed = [weights.b if "embed" not in name else weights.b[IDS] for name, weights in found.weights.items()]
    assert all(np.abs(b).max() > 0 for b in changed)
    assert not np.array_equal(model.generate(IDS, max_new_tokens=3, eos_token_id=None).numpy(), text)
    lora.add_adapter(model, lora.LoraConfig(r=3), name="second")
    compiled(model).fit(IDS, IDS, epochs=1, batch_size=2, verbose=0)
    again = lora.adapter_of(model)
    assert all(np.array_equal(again.weights[name].a, weights.a) for name, weights in found.weights.items())
    assert all(np.abs(weights.b).max() > 0 for weights in lora.adapter_of(model, "second").weights.values())


def test_a_trained_step_is_of_the_adapter_that_is_active_now():
    model = compiled(adapted())
    lora.add_adapter(model, lora.LoraConfig(r=3), name="second")
    lora.set_adapter(model, ["default", "second"])
    model.fit(IDS, IDS, epochs=1, batch_size=2, verbose=0)
    lora.set_adapter(model, "default")
    kept = lora.adapter_of(model, "second")
    before = lora.adapter_of(model)
    model.fit(IDS, IDS, epochs=1, batch_size=2, verbose=0)
    after = lora.adapter_of(model, "second")
    assert all(np.array_equal(after.weights[name].b, weights.b) for name, weights in kept.weights.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(lora.adapter_of(model).weights[name].a, before.weights[name].a)
    one = model.predict(IDS, verbose=0).logits
    with lora.disable_adapter(model):
        assert np.abs(model.predict(IDS, verbose=0).logits - one).max() > 1e-3
    assert np.array_equal(model.predict(IDS, verbose=0).logits, one)


def test_inputs_are_dropped_in_training_alone_and_alike_when_a_layer_is_computed_again():
    dropping, plain = adapted(lora_dropout=0.5), adapted()
    assert np.array_equal(logits(dropping), logits(plain))
    assert np.array_equal(logits(plain, training=True), logits(plain))
    first, second = logits(dropping, training=True), logits(dropping, training=True)
    assert np.abs(first - second).max() > 1e-3
    found = []
    for checkpointed in (False, True):
        last = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "lora_alpha": 0.5}
        model = adapted(lora_dropout=0.5, **last)
        if checkpointed:
            model.gradient_checkpointing_enable()
        low = model.model.decoder_layers[0].mlp.down_proj.lora["default"]

        def loss(model=model):
            return model(IDS, labels=IDS, training=True).loss

        tf.random.set_seed(3)
        with tf.GradientTape() as tape:
            value = loss()
        gradient = tape.gradient(value, low.b.value).numpy()
        step, differences = 1e-2, []
        for sign in (1, -1):
            low.b.assign_add(sign * step * np.sign(gradient))
            tf.random.set_seed(3)
            differences.append(float(loss()))
            low.b.assign_sub(sign * step * np.sign(gradient))
        found.append((np.abs(gradient).sum(), (differences[0] - differences[1]) / (2 * step)))
    for wanted, difference in found:
        assert abs(difference - wanted) < 0.05 * wanted


def test_keras_files_have_the_adapters_beside_the_base(tmp_path):
    model = adapted(modules_to_save=["lm_head"], use_dora=True, target_modules=["q_proj", "o_proj"])
    lora.add_adapter(model, lora.LoraConfig(r=3, init_lora_weights=False), name="second")
    lora.set_adapter(model, "default")
    compiled(model).fit(IDS, IDS, epochs=1, batch_size=2, verbose=0)
    wanted = logits(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.array_equal(logits(loaded), wanted)
    assert [v.path for v in loaded.trainable_variables] == [v.path for v in model.trainable_variables]
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    lora.save_adapter(loaded, tmp_path / "second", name="second")
    lora.save_adapter(model, tmp_path / "wanted", name="second")
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("second", "wanted")]
    assert written[0] == written[1]
    loaded.fit(IDS, IDS, epochs=1, batch_size=2, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model).write(str(tmp_path / "checkpoint"))
    for name in ("h5", "checkpoint", "copy"):
        other = copy.deepcopy(model) if name == "copy" else model.from_config(model.get_config())
        if name == "h5":
            other.load_weights(tmp_path / "model.weights.h5")
        if name == "checkpoint":
            tf.train.Checkpoint(other).read(str(tmp_path / "checkpoint")).assert_existing_objects_matched()
        assert np.array_equal(logits(other), wanted)
    lora.merge(model)
    with pytest.raises(UnsupportedFeatureError, match="the adapter default is merged, and Keras' files have adapters"):
        model.save(tmp_path / "merged.keras")
    lora.unmerge(model)
    assert np.array_equal(logits(model), wanted)


def test_an_adapter_of_a_packed_base_is_trained_and_saved_with_it(tmp_path):
    model = lora.add_adapter(mistral_tf.quantize(make(), "nf4"), lora.LoraConfig(init_lora_weights=False))
    losses = compiled(model).fit(IDS, IDS, epochs=3, batch_size=2, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    assert np.array_equal(logits(keras.saving.load_model(tmp_path / "model.keras")), logits(model))


def test_a_saved_model_has_the_adapter_in_it(tmp_path):
    model = adapted()
    wanted = logits(model)
    model.export(tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    inputs = {"input_ids": tf.constant(IDS, tf.int32), "attention_mask": tf.ones(IDS.shape, tf.int32)}
    assert np.abs(served.serve(inputs)["logits"].numpy() - wanted).max() < 1e-5


def test_a_layer_of_others_gets_no_adapter():
    model = make()
    attention = model.model.decoder_layers[0].self_attn
    model._replace_part(attention, "q_proj", keras.layers.Dense(48))
    with pytest.raises(UnsupportedFeatureError, match=r"q_proj.weight: adapters go to the modules that models here"):
        lora.add_adapter(model)
