"""One of two workers of a MultiWorkerMirroredStrategy: `test_tf_strategies.py` starts both.

    python tests/backends/tf_worker.py TASK RANK PORT PORT DIRECTORY

It prints what it found as JSON. A task is "everything", or one in which a worker is killed: "steps 1", "saving 0".
Rows of a batch have unequal numbers of labels: 2 on one worker, 30 on the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

TASK, RANK, PORTS, DIRECTORY = sys.argv[1], int(sys.argv[2]), sys.argv[3:5], sys.argv[5]
CLUSTER = {"worker": [f"127.0.0.1:{port}" for port in PORTS]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": RANK}})

import keras  # noqa: E402  after TF_CONFIG
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import mistral_tf  # noqa: E402
from mistral_core.config.presets import TINY  # noqa: E402
from mistral_core.errors import MistralError  # noqa: E402

CONFIG = TINY.replace(num_hidden_layers=1, layer_types=None)
IDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (5, 16))
LABELS = np.where(np.arange(16) < np.array([2, 2, 16, 16, 9])[:, None], IDS, -100)
COUNT = (LABELS[:4, 1:] != -100).sum()
WEIGHT = np.float32([1, 3, 0.5, 2, 4])
FITTING = {"batch_size": 4, "shuffle": False, "epochs": 1, "verbose": 0}
STRATEGY = tf.distribute.MultiWorkerMirroredStrategy()  # whose start waits for the other worker
ONE = tf.distribute.get_strategy()


def made(strategy, **options):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = mistral_tf.MistralForCausalLM(CONFIG)
        model.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"], run_eagerly=strategy is ONE, **options)
    return model


def apart(some, others):
    """The largest difference of all arrays, to the largest number of the same array where that is more than 0.1."""
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(np.subtract(a, b)).max() / max(np.abs(b).max(), 0.1)) for a, b in pairs)


def by_hand(strategy, parts):
    """Losses of two steps and the weights after them, each step's rows taken in so many parts."""
    model = made(strategy)
    variables = model.trainable_variables

    def step(rows):
        total, sums = 0.0, [tf.zeros_like(v) for v in variables]
        for part in range(parts):
            size = tf.shape(rows["input_ids"])[0] // parts
            given = {name: value[part * size : (part + 1) * size] for name, value in rows.items()}
            with tf.GradientTape() as tape:
                loss = model(**given, num_items_in_batch=None if parts == 1 else COUNT, training=True).loss
            found = tape.gradient(loss, variables)
            total, sums = total + loss, [a + tf.convert_to_tensor(b) for a, b in zip(sums, found, strict=True)]
        model.optimizer.apply_gradients(zip(sums, variables, strict=True))
        return total

    def whole(rows):
        return strategy.reduce("SUM", strategy.run(step, (rows,)), None)

    run = whole if strategy is ONE else tf.function(whole)
    data = tf.data.Dataset.from_tensor_slices({"input_ids": IDS[:4], "labels": LABELS[:4]}).batch(4).repeat(2)
    losses = [float(run(rows)) for rows in strategy.experimental_distribute_dataset(data)]
    return [losses, *model.get_weights()]


def by_name(strategy):
    """Logs of fit with a loss by name, and weights."""
    model = made(strategy, loss="sparse_categorical_crossentropy")
    return [*model.fit(IDS, LABELS, **FITTING).history.values(), *model.get_weights()]


def fitted(strategy):
    """Logs of fit and evaluate, predictions of five rows and weights."""
    model, more = made(strategy), {"sample_weight": WEIGHT, "validation_data": (IDS, LABELS)}
    logs = model.fit(IDS, LABELS, **FITTING, **more).history
    logits = model.predict(IDS, batch_size=4, verbose=0).logits
    return model, [*logs.values(), logits, *model.get_weights()]


def error_of(attempt):
    try:
        attempt()
    except MistralError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def everything():
    one = by_hand(ONE, 1)
    yield "by hand", max(apart(by_hand(STRATEGY, parts), one) for parts in (1, 2))
    yield "by name", apart(by_name(STRATEGY), by_name(ONE))
    (model, found), (alone, wanted) = fitted(STRATEGY), fitted(ONE)
    yield "fit", apart(found, wanted)
    several = {"max_new_tokens": 4, "do_sample": True, "seed": 1}
    yield "generate", np.array_equal(model.generate(IDS, **several), alone.generate(IDS, **several))
    yield "unwritten", error_of(lambda: model.save_pretrained(f"{DIRECTORY}/a file/saved"))
    model.save_pretrained(f"{DIRECTORY}/saved")
    with STRATEGY.scope():
        loaded = type(model).from_pretrained(f"{DIRECTORY}/saved")
    yield "saved", apart(loaded.get_weights(), model.get_weights()) == 0
    yield "pushed", error_of(lambda: model.push_to_hub("a/b"))


def killed():
    """Save each epoch; one worker dies in the third, before its steps or as it gives its parts of a checkpoint."""
    what, who = TASK.split()
    model = made(STRATEGY)
    dies = int(who) == RANK

    def array(name, of=model._array):
        os.kill(os.getpid(), signal.SIGKILL) if dies and epoch == 3 and "norm" in name else None
        return of(name)

    for epoch in range(1, 5):
        if epoch == 3:
            print("alive", flush=True)
            if what == "saving":
                model._array = array
            elif dies:
                os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        try:
            model.fit(IDS, LABELS, batch_size=4, verbose=0)
            model.save_pretrained(f"{DIRECTORY}/saved")
        except (tf.errors.OpError, MistralError) as error:
            yield "ended", f"{type(error).__name__}: {error}"
            yield "seconds", time.monotonic() - started
            return


if __name__ == "__main__":
    print(json.dumps(dict(everything() if TASK == "everything" else killed())), flush=True)
    if TASK != "everything":
        os._exit(0)  # without a farewell to the one who is gone
