"""A step is the same however its rows were split: over accumulated batches, devices and replicas."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from mistral_core.config.presets import TINY

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (4, 9))
LABELS = np.where(np.arange(9) < np.array([[9], [2], [5], [3]]), IDS, -100)  # rows of unequal numbers of labels
COUNT = int((LABELS[:, 1:] != -100).sum())


@pytest.mark.feature("Gradient accumulation: num_items_in_batch")
def test_accumulated_gradients_are_those_of_the_step_torch():
    torch = pytest.importorskip("torch")
    import mistral_torch

    model, ids, labels = mistral_torch.MistralForCausalLM(CONFIG), torch.from_numpy(IDS), torch.from_numpy(LABELS)
    model(ids, labels=labels).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for count in (COUNT, torch.tensor(COUNT), np.int64(COUNT)):
        model.zero_grad()
        for row in range(4):
            model(ids[row], labels=labels[row], num_items_in_batch=count).loss.backward()
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, wanted[name], atol=1e-6), name


@pytest.mark.parametrize("package", ["mistral_torch", "mistral_flax", "mistral_tf", "mistral_core.reference"])
def test_the_mean_over_devices_with_fewer_labels_than_devices(package):
    """Two labels over four devices whose losses are averaged: each divides by half a label."""
    total, count = np.float32([0.5, 3.0, 0.0, 0.0]), np.int64([1, 1, 0, 0])
    if package == "mistral_core.reference":
        from mistral_core.reference.ops import divided
    else:
        divided = pytest.importorskip(f"{package}.losses").divided
        array = pytest.importorskip(f"{package}.arrays").from_numpy
        total, count = array(total), array(count)
    losses = [float(divided(total[rank], count[rank], 2 / 4)) for rank in range(4)]
    assert np.mean(losses) == 3.5 / 2
    assert float(divided(total[2], count[2])) == 0, "nothing counted"


@pytest.mark.feature("transformers' Trainer")
@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_trainer_s_step_is_the_same_however_it_is_split_torch(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    import mistral_torch

    rows = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS, strict=True)]
    models = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = mistral_torch.MistralForCausalLM(CONFIG)
        arguments = transformers.TrainingArguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=1, seed=0,
            learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.allclose(models[0], other, atol=1e-6) for other in models[1:])


@pytest.mark.feature("Gradient accumulation: num_items_in_batch")
def test_devices_add_up_sums_and_counts_flax():
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    from mistral_flax import MistralForCausalLM
    from mistral_flax.losses import cross_entropy, divided

    model = MistralForCausalLM(CONFIG)
    whole = jax.jit(jax.value_and_grad(lambda p: model(IDS, labels=LABELS, params=p).loss))
    wanted, gradients = whole(model.params)

    def over_the_mapped_axis(params, ids, labels):
        def loss(params):
            logits = model(ids, params=params, use_cache=False).logits
            sums = cross_entropy(logits[:, :-1], labels[:, 1:])
            total, count = jax.lax.psum(sums, "rows")
            return divided(total, count)

        return jax.value_and_grad(loss)(params)

    split = jax.jit(jax.vmap(over_the_mapped_axis, (None, 0, 0), axis_name="rows"))
    found, parts = split(model.params, IDS[:, None], LABELS[:, None])  # what jax.pmap does, on one device
    assert np.allclose(found, wanted, atol=1e-6)
    # each row's gradient of the sum of all rows' losses, of which the whole is the mean
    assert all(np.allclose(parts[name].mean(0), g, atol=1e-5) for name, g in gradients.items())

    def part(params, ids, labels):
        return model(ids, labels=labels, params=params, num_items_in_batch=jnp.int32(COUNT)).loss

    gradient = jax.jit(jax.grad(part))
    total = jax.tree.map(
        lambda *leaves: sum(leaves), *(gradient(model.params, *row) for row in zip(IDS, LABELS, strict=True))
    )
    assert all(np.allclose(total[name], g, atol=1e-6) for name, g in gradients.items())


@pytest.fixture
def keras_model():
    """A model of Keras, and a function of rows that gives the gradients of their loss as arrays."""
    tf = pytest.importorskip("tensorflow")
    import mistral_tf

    model = mistral_tf.MistralForCausalLM(CONFIG)

    def gradients(rows, count=None):
        with tf.GradientTape() as tape:
            loss = model(IDS[rows], labels=LABELS[rows], num_items_in_batch=count).loss
        return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, model.trainable_variables)]

    return model, gradients


def close(some, others):
    return all(np.allclose(a, b, atol=1e-6) for a, b in zip(some, others, strict=True))


@pytest.mark.feature("Gradient accumulation: num_items_in_batch")
def test_accumulated_gradients_are_those_of_the_step_tf(keras_model):
    _, gradients = keras_model
    parts = [gradients([row], COUNT) for row in range(4)]
    assert close(map(sum, zip(*parts, strict=True)), gradients(slice(4)))


def test_keras_own_accumulation_is_the_mean_of_means_tf(keras_model):
    import keras

    model, gradients = keras_model
    halves = [gradients(slice(2)), gradients(slice(2, 4))]
    means = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    whole = gradients(slice(4))
    before = [v.numpy() for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), run_eagerly=True)
    model.fit(IDS, LABELS, batch_size=2, shuffle=False, verbose=0)
    step = [was - v.numpy() for was, v in zip(before, model.trainable_variables, strict=True)]
    assert close(step, means)
    assert not close(step, whole)


REPLICAS = """
import sys
import keras, numpy as np, tensorflow as tf
cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from mistral_core.config.presets import TINY
import mistral_tf
ids = np.random.default_rng(0).integers(3, TINY.vocab_size, (9, 9))
labels = np.where(np.arange(9) < np.array([[9], [8], [2], [5], [3], [1], [7], [2], [2]]), ids, -100)
weight = np.float32([1, 3, 0, 2, 0.5, 1, 1, 2, 4])
config = TINY.replace(num_hidden_layers=1, layer_types=None, classifier_dropout=0.0)
classes = {"labels": ids[:, 0] % config.num_labels}
KINDS = {
    "MistralForCausalLM": {"labels": labels},
    "MistralForSequenceClassification": classes,
    "MistralForTokenClassification": {"labels": np.where(labels < 0, labels, labels % config.num_labels)},
    "MistralForQuestionAnswering": {
        "start_positions": np.array([0, 40, 40, 1, 2, 3, 40, 4, 5]), "end_positions": ids[:, 1] % 9,
    },
}

def trained(strategy, kind, loop, eagerly):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = getattr(mistral_tf, kind)(config)
        model.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"], run_eagerly=eagerly)
    data = tf.data.Dataset.from_tensor_slices({"input_ids": ids, **KINDS[kind]}).batch(6)
    if loop == "weighted":
        data = tf.data.Dataset.from_tensor_slices(({"input_ids": ids}, KINDS[kind]["labels"], weight)).batch(6)
    if loop != "own":
        losses = model.fit(data, epochs=2, verbose=0).history["loss"]
    else:
        def step(rows):
            with tf.GradientTape() as tape:
                loss = model(**rows, training=True).loss
            variables = model.trainable_variables
            model.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
            return loss
        @tf.function
        def whole(rows):
            return strategy.reduce("SUM", strategy.run(step, (rows,)), None)
        losses = [float(whole(rows)) for _ in range(2) for rows in strategy.experimental_distribute_dataset(data)]
    return losses, np.concatenate([np.ravel(w) for w in model.get_weights()])

TWO, ONE = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.OneDeviceStrategy("CPU:0")
for case in sys.argv[1:]:
    kind, loop = case.split(":")
    # the language model has a graph, and loops of one's own; without one the same numbers take a third of the time
    eagerly = case != "MistralForCausalLM:fit"
    two, one = trained(TWO, kind, loop, eagerly and loop != "own"), trained(ONE, kind, loop, eagerly)
    assert np.allclose(two[0], one[0], rtol=1e-4), (kind, loop, two[0], one[0])
    assert np.allclose(two[1], one[1], atol=1e-5), (kind, loop, np.abs(two[1] - one[1]).max())
    assert two[0][1] < two[0][0] or loop == "own", (kind, loop, two[0])
"""


# heads, with weights of rows and without; loops of one's own are in test_tf_strategies.py, on workers and replicas, and
# there the language model is fitted by its own loss too, by batches of which one replica has all
EACH = ("SequenceClassification:weighted", "TokenClassification:fit", "QuestionAnswering:fit")
FURTHER = (
    "CausalLM:fit", "CausalLM:own", "CausalLM:weighted", "SequenceClassification:fit", "QuestionAnswering:own",
)  # fmt: skip


@pytest.mark.feature("tf.distribute strategies")
@pytest.mark.parametrize("cases", [EACH, pytest.param(FURTHER, marks=pytest.mark.slow)], ids=["each", "further"])
def test_two_replicas_train_as_one_device_does_tf(cases):
    """Under MirroredStrategy and OneDeviceStrategy, in `fit`, with weights of rows, and in a loop of one's own."""
    pytest.importorskip("tensorflow")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", REPLICAS, *(f"MistralFor{case}" for case in cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
