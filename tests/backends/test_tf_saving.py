"""Every way in which TensorFlow and Keras save and restore a model gives every tensor back, bit for bit."""

from __future__ import annotations

import copy
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from mistral_core.config.presets import TINY
from mistral_core.parameters import HEADS, shapes
from mistral_tf import MistralForCausalLM, MistralModel

# Keras reads its variables so when it saves them
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
    pytest.mark.feature("Saving in the framework's own format"),
]

CONFIG = TINY.replace(num_hidden_layers=2, num_labels=3)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (3, 9)).astype(np.int32)


def filled(kind, config=CONFIG, dtype="float32"):
    """A model of random bits: denormals, infinities and NaNs with a payload among them."""
    model = kind(config, dtype=dtype)
    random = np.random.default_rng(1)
    for name, array in list(model.named_arrays()):
        bits = random.integers(0, 256, array.nbytes, np.uint8)
        model.set_parameter(name, bits.view(array.dtype).reshape(array.shape))
    return model


def bits(model):
    return {name: array.tobytes() for name, array in model.named_arrays()}


def like(model):
    return type(model)(model.config, dtype=model.dtype_policy, name=model.name)


def checkpoint(model, folder):
    other = like(model)
    path = tf.train.Checkpoint(model=model).save(folder / "kept")
    status = tf.train.Checkpoint(model=other).restore(path)
    status.assert_consumed()
    status.assert_existing_objects_matched()
    return other


def checkpoint_of_the_model_alone(model, folder):
    other = like(model)
    tf.train.Checkpoint(other).read(tf.train.Checkpoint(model).write(folder / "kept")).assert_consumed()
    return other


def checkpoint_manager(model, folder):
    other = like(model)
    tf.train.CheckpointManager(tf.train.Checkpoint(model=model), folder, max_to_keep=2).save()
    assert tf.train.CheckpointManager(tf.train.Checkpoint(model=other), folder, max_to_keep=2).restore_or_initialize()
    return other


def saved_model(model, folder):
    other = like(model)
    tf.saved_model.save(model, folder)
    read = tf.train.Checkpoint(other).read(str(folder / "variables" / "variables")).expect_partial()
    read.assert_existing_objects_matched()
    return other


def export(model, folder):
    other = like(model)
    model.export(folder, verbose=False)
    served = tf.saved_model.load(folder).variables
    for variable, value in zip(other.variables, served, strict=True):
        variable.assign(value)
    return other


def keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def weights_file(model, folder):
    other = like(model)
    model.save_weights(folder / "model.weights.h5")
    other.load_weights(folder / "model.weights.h5")
    return other


def model_checkpoint(model, folder):
    callback = keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras")
    callback.set_model(model)
    callback.on_epoch_end(0, {})
    return keras.models.load_model(folder / "1.keras")


def backup_and_restore(model, folder):
    other = like(model)
    for each in (model, other):
        each.compile("sgd")
        callback = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        callback.set_model(each)
        callback.on_train_begin()  # restores where something is kept
        callback.on_epoch_end(0)
    return other


def weights_as_a_list(model, folder):
    other = like(model)
    other.set_weights(model.get_weights())
    return other


def state_tree(model, folder):
    other = like(model)
    for each in (model, other):
        each.compile()
    other.set_state_tree(model.get_state_tree())
    return other


def clone(model, folder):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


def pickled(model, folder):
    return pickle.loads(pickle.dumps(model))


def deep_copy(model, folder):
    return copy.deepcopy(model)


WAYS = (checkpoint, checkpoint_of_the_model_alone, checkpoint_manager, saved_model, export, keras_file, weights_file,
        model_checkpoint, backup_and_restore, weights_as_a_list, state_tree, clone, pickled, deep_copy)  # fmt: skip


@pytest.fixture(scope="module", params=[(False, "float32"), (True, "bfloat16")], ids=["float32", "tied-bfloat16"])
def model(request):
    tied, dtype = request.param
    return filled(MistralForCausalLM, CONFIG.replace(tie_word_embeddings=tied), dtype)


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_comes_back(model, way, tmp_path):
    before = bits(model)
    other = way(model, tmp_path)
    assert bits(other) == before == bits(model)
    assert other.dtype_policy == model.dtype_policy
    assert (other.lm_head is None) == model.config.tie_word_embeddings
    assert len(other.weights) == len(shapes(model.config))


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_of_every_class(head, tmp_path):
    model = filled(getattr(mistral_tf, head), dtype="mixed_bfloat16")
    assert bits(checkpoint(model, tmp_path)) == bits(model)


def test_names_in_a_checkpoint_are_those_of_attributes(tmp_path):
    path = tf.train.Checkpoint(model=MistralForCausalLM(CONFIG)).write(str(tmp_path / "kept"))
    names = {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name, _ in tf.train.list_variables(path)}
    assert "model/model/decoder_layers-1/self_attn/q_proj/weight" in names
    assert len(names) == len(shapes(CONFIG)) + 1  # the graph


def test_layers_of_one_s_own_in_lists_and_dictionaries(tmp_path):
    class Mine(MistralModel):
        def __init__(self, config, **options):
            super().__init__(config, **options)
            self.adapters = {"a": [keras.layers.Dense(2), keras.layers.Dense(3)]}
            self._scales = [self.add_weight(shape=(2,), name="scale")]
            for layer in self.adapters["a"]:
                layer.build([None, config.hidden_size])

    model, other = (Mine(CONFIG, dtype="float32") for _ in range(2))
    path = tf.train.Checkpoint(model=model).save(tmp_path / "kept")
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    assert len(model.weights) == len(shapes(CONFIG, "MistralModel")) + 5
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


def test_a_model_inside_another_s_checkpoint(tmp_path):
    class Scores(keras.Model):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.dense = keras.layers.Dense(2)
            self.dense.build([None, CONFIG.hidden_size])

    models = [Scores(filled(MistralModel)), Scores(MistralModel(CONFIG, dtype="float32"))]
    path = tf.train.Checkpoint(model=models[0]).save(tmp_path / "kept")
    tf.train.Checkpoint(model=models[1]).restore(path).assert_existing_objects_matched()
    assert bits(models[1].body) == bits(models[0].body)


def test_an_optimizer_goes_on_from_a_checkpoint(tmp_path):
    def steps(model, count):
        for _ in range(count):
            gradients = [tf.ones_like(variable.value) / 3 for variable in model.trainable_variables]
            model.optimizer.apply(gradients, model.trainable_variables)
        return [np.asarray(variable) for variable in (*model.variables, *model.optimizer.variables)]

    model, other = (MistralForCausalLM(CONFIG, dtype="float32") for _ in range(2))
    model.compile(keras.optimizers.Adam(1e-2))
    other.compile(keras.optimizers.Adam(1e-2))
    steps(model, 2)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "kept")
    status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)  # which has no moments yet
    status.assert_existing_objects_matched()
    expected, found = steps(model, 1), steps(other, 1)
    status.assert_consumed()
    assert other.optimizer.iterations == 3
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_model_compiled_and_not_yet_trained_is_saved_without_a_warning(tmp_path):
    model = MistralForCausalLM(CONFIG)
    model.compile("adam")
    other = keras_file(model, tmp_path)
    assert not other.optimizer.built
    other.optimizer.apply(list(map(tf.zeros_like, other.trainable_variables)), other.trainable_variables)
    assert keras_file(other, tmp_path).optimizer.built
