"""A model under a MirroredStrategy of two logical CPUs beside one device: `test_tf_strategies.py` starts it.

    python tests/backends/tf_replicas.py DIRECTORY LOOPS

LOOPS is JSON: a name -> a head and the parts of a step. It prints what it found as JSON. Rows of a batch have unequal
numbers of labels: 2 on one replica, 30 on the other.
"""

from __future__ import annotations

import functools
import json
import sys

import keras
import numpy as np
import tensorflow as tf

CPUS = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(CPUS[0], [tf.config.LogicalDeviceConfiguration()] * 2)

import mistral_tf  # noqa: E402  after the devices, which are made once
from mistral_core.config.presets import TINY  # noqa: E402
from mistral_core.errors import MistralError  # noqa: E402

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None, classifier_dropout=0.0)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (9, 16))
LABELS = np.where(np.arange(16) < np.array([2, 2, 16, 16, 9, 3, 1, 5, 7])[:, None], IDS, -100)
POSITIONS = np.array([40, 40, 3, 1, 40, 2, 3, 4, 5]), np.array([1, 2, 3, 9, 40, 5, 40, 7, 8])
DATA = {
    "MistralForCausalLM": {"labels": LABELS},
    "MistralForSequenceClassification": {"labels": IDS[:, 0] % CONFIG.num_labels},
    "MistralForTokenClassification": {"labels": np.where(LABELS < 0, LABELS, LABELS % CONFIG.num_labels)},
    "MistralForQuestionAnswering": {"start_positions": POSITIONS[0], "end_positions": POSITIONS[1]},
}
WEIGHT = np.float32([1, 3, 0, 2, 0.5, 1, 1, 2, 4])
BY_NAME = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
WEIGHTED = {**BY_NAME, "weighted_metrics": ["sparse_categorical_crossentropy"]}
ADDED_UP = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")}
FITS = {
    # what is fitted, how it is compiled, rows of a batch, and the arguments of fit; the last three without a graph
    "loss by name": ("MistralForCausalLM", WEIGHTED, 5, {"sample_weight": WEIGHT}),
    "a replica without rows": ("MistralForCausalLM", {"metrics": ["accuracy"]}, 4, {}),
    "class weights": ("MistralForSequenceClassification", BY_NAME, 5, {"class_weight": {0: 1.0, 1: 5.0, 2: 0.5}}),
    "two outputs": ("MistralForQuestionAnswering", {**BY_NAME, "metrics": None}, 5, {}),
    "a sum": ("MistralForSequenceClassification", ADDED_UP, 5, {}),
}
TWO, ONE = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), tf.distribute.get_strategy()  # none that was asked for


def made(strategy, kind="MistralForCausalLM", **options):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = getattr(mistral_tf, kind)(CONFIG)
        model.compile(keras.optimizers.SGD(0.1), **options)
    return model


def apart(some, others):
    """The largest difference of all arrays, to the largest number of the same array where that is more than 0.1."""
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 0.1)) for a, b in pairs)


GRAPHS = [*FITS][:2]


def fitted(strategy, kind, options, rows, more):
    model = made(strategy, kind, **options)
    y = [*DATA[kind].values()]
    y = y[0] if len(y) == 1 else dict(DATA[kind])
    logs = model.fit(IDS, y, batch_size=rows, shuffle=False, verbose=0, **more).history
    logs |= {f"of {k}": [v] for k, v in model.evaluate(IDS, y, batch_size=rows, verbose=0, return_dict=True).items()}
    # the losses of each of two outputs are logged by Keras itself, as means of what the replicas have
    return {k: v for k, v in logs.items() if "logits_loss" not in k}, model.get_weights()


def fits():
    for name, (kind, options, rows, more) in FITS.items():
        # one device has a graph in the tests of fit; without one the same numbers take a third of the time
        eager = {TWO: name not in GRAPHS, ONE: True}
        two, one = (fitted(s, kind, {**options, "run_eagerly": eager[s]}, rows, more) for s in (TWO, ONE))
        yield name, {"logs": apart(two[0].values(), one[0].values()), "weights": apart(two[1], one[1])}


def gradients(strategy, kind, parts):
    """Loss and gradients of four rows, each replica's in so many parts; of one part it asks for no count."""
    model, labels = made(strategy, kind), {name: value[:4] for name, value in DATA[kind].items()}
    if kind == "MistralForCausalLM":
        count = (labels["labels"][:, 1:] != -100).sum()
    elif kind == "MistralForQuestionAnswering":  # start and end have a count each
        count = np.stack([(value < 16).sum() for value in labels.values()])
    else:
        count = (labels["labels"] != -100).sum()

    def step(rows):
        total, sums = 0.0, [tf.zeros_like(v) for v in model.trainable_variables]
        size = tf.shape(rows["input_ids"])[0] // parts
        for part in range(parts):
            given = {name: value[part * size : (part + 1) * size] for name, value in rows.items()}
            with tf.GradientTape() as tape:
                loss = model(**given, num_items_in_batch=None if parts == 1 else count, training=True).loss
            found = tape.gradient(loss, model.trainable_variables)
            total, sums = total + loss, [a + tf.convert_to_tensor(b) for a, b in zip(sums, found, strict=True)]
        return tf.distribute.get_replica_context().all_reduce("SUM", [total, *sums])

    data = tf.data.Dataset.from_tensor_slices({"input_ids": IDS[:4], **labels}).batch(4)
    (rows,) = strategy.experimental_distribute_dataset(data)
    run = tf.function(lambda rows: strategy.run(step, (rows,))) if strategy is TWO else strategy.run
    found = run(rows) if strategy is TWO else run(step, (rows,))
    return [strategy.experimental_local_results(value)[0].numpy() for value in found]


def loops(asked):
    one = functools.cache(lambda kind: gradients(ONE, kind, 1))
    for name, (kind, parts) in asked.items():
        yield name, apart(gradients(TWO, kind, parts), one(kind))


def variables(model):
    """Whether all weights are on both devices, and the same on both."""
    copies = [TWO.experimental_local_results(weight.value) for weight in model.weights]
    on_both = all([c.device[-5:] for c in each] == ["CPU:0", "CPU:1"] for each in copies)
    return on_both and all(np.array_equal(*(c.numpy() for c in each)) for each in copies)


def text(model, **options):
    return model.generate(IDS[:2, :5], max_new_tokens=6, eos_token_id=None, **options).numpy().tolist()


def lives(directory):
    """Generate, save and load a model under a strategy, and change its parts from outside of the scope."""
    two, one = made(TWO), made(ONE)
    yield "mirrored", variables(two)
    for options in ({}, {"do_sample": True, "seed": 3, "compile": "off"}, {"num_beams": 2, "compile": "off"}):
        yield f"generate {options}", text(two, **options) == text(one, **options)
    two.fit(IDS, IDS, batch_size=4, verbose=0)
    two.save_pretrained(f"{directory}/saved")
    two.save(f"{directory}/model.keras")
    with TWO.scope():
        loaded = type(two).from_pretrained(f"{directory}/saved")
        again = keras.models.load_model(f"{directory}/model.keras")
    for name, model in {"saved": loaded, ".keras": again}.items():
        yield name, variables(model) and apart(model.get_weights(), two.get_weights()) == 0
    two.resize_token_embeddings(100)
    yield "resized", variables(two) and two.get_input_embeddings().weight.shape[0] == 100
    mistral_tf.quantize(two, "int8")
    yield "packed", variables(two)


def outside(inside):
    """What is made in and out of the scope the wrong way round."""
    keras.utils.set_random_seed(0)
    model = mistral_tf.MistralForCausalLM(CONFIG)
    if not inside:
        model.compile("sgd")
    with TWO.scope():
        if inside:
            model.compile("sgd")
        model.fit(IDS, IDS, verbose=0)


def refusals():
    attempts = {
        "jit_compile": lambda: made(TWO, jit_compile=True),
        "steps_per_execution": lambda: made(TWO, steps_per_execution=2),
        "a model from outside": lambda: outside(True),
        "a compiled model from outside": lambda: outside(False),
        "an optimizer from outside": lambda: made(TWO).compile(keras.optimizers.SGD(0.1)),
        "no error": lambda: made(TWO).compile("sgd"),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except MistralError as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, "nothing"


if __name__ == "__main__":
    directory, asked = sys.argv[1], json.loads(sys.argv[2])
    parts = {"fits": fits(), "loops": loops(asked), "lives": lives(directory), "refusals": refusals()}
    print(json.dumps({name: dict(found) for name, found in parts.items()}))
