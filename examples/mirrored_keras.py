"""Train a language model with Keras over devices, each of which has all weights and some of the rows.

Those of a machine, where a CPU plays two, or of several machines, which TF_CONFIG names.

Prints:

    2 replicas
    the loss falls in fit: True
    and in a loop: True
    Emma was reading about attention masks.
"""

from __future__ import annotations

import os

import keras
import numpy as np
import tensorflow as tf

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_tf import MistralForCausalLM, MistralTokenizer


def main() -> None:
    """Train, ask and save."""
    if not tf.config.list_physical_devices("GPU"):
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
    kinds = tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy
    strategy = kinds["TF_CONFIG" in os.environ]()
    print(strategy.num_replicas_in_sync, "replicas")
    with strategy.scope():
        model = MistralForCausalLM.from_pretrained(path, dtype="float32")
        model.compile(keras.optimizers.Adam(1e-3))
    tokenizer = MistralTokenizer.from_pretrained(path)
    texts = ["Emma was reading about attention masks.", "It rained."] * 2
    batch = dict(tokenizer(texts, padding=True, return_tensors="np"))
    batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], -100)  # padding is not learnt
    data = tf.data.Dataset.from_tensor_slices(batch).batch(4)  # 4 rows a step, of all replicas together
    losses = model.fit(data, epochs=20, verbose=0).history["loss"]
    print("the loss falls in fit:", losses[-1] < losses[0])

    def of_replica(rows: dict[str, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = model(**rows, training=True).loss  # over the labels of all replicas: they add up
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    step = tf.function(lambda rows: strategy.reduce("SUM", strategy.run(of_replica, (rows,)), None))
    losses += [float(step(rows)) for rows in strategy.experimental_distribute_dataset(data.repeat(20))]
    print("and in a loop:", losses[-1] < losses[20])
    out = model.generate([tokenizer.encode("Emma was")], max_new_tokens=9)
    print(tokenizer.decode(out[0].numpy(), skip_special_tokens=True))
    model.save_pretrained("trained")  # in all workers: the first one writes


if __name__ == "__main__":
    main()
