"""Make a classifier of a language model with Keras: compile, fit, evaluate, save and load.

Prints:

    accuracy 1.0
    the loaded model says the same: True
"""

from __future__ import annotations

import keras
import numpy as np

from mistral_core.data import TINY_CHECKPOINT as path  # or "mistralai/Mistral-7B-v0.1"
from mistral_tf import AutoTokenizer, MistralForSequenceClassification

TEXTS = {
    "Emma was very happy": 1,
    "She was all delight and joy": 1,
    "He smiled with great pleasure": 1,
    "Her father was ill": 0,
    "They were miserable and wept": 0,
    "It was a dreadful grief": 0,
}


def main() -> None:
    """Train until the six sentences are told apart."""
    keras.utils.set_random_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="np")
    labels = np.array(list(TEXTS.values()))
    model = MistralForSequenceClassification.from_pretrained(path, num_labels=2, dtype="float32")
    model.compile(keras.optimizers.Adam(1e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(batch, labels, epochs=8, verbose=0)
    print("accuracy", model.evaluate(batch, labels, verbose=0, return_dict=True)["accuracy"])

    model.save("moods.keras")
    again = keras.models.load_model("moods.keras")
    same = np.array_equal(again.predict(batch, verbose=0).logits, model.predict(batch, verbose=0).logits)
    print("the loaded model says the same:", same)


if __name__ == "__main__":
    main()
