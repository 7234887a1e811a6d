"""Keras trains and measures our models: compile, fit, evaluate, predict, with its losses, metrics and callbacks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import mistral_tf
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.errors import InputError
from mistral_core.text.encoding import Encoding
from mistral_tf import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)

CONFIG = TINY.replace(num_hidden_layers=1, classifier_dropout=0.0)
B, T = 4, 9
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(3, CONFIG.vocab_size, (B, T)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[0, :3] = 0
TOKENS = np.where(MASK == 1, IDS, -100)
TAGS = np.where(MASK == 1, IDS % CONFIG.num_labels, -100)
CLASSES = np.array([1, 6, 0, 3], np.int32)
SPANS = {"start_positions": np.array([3, 0, 5, T]), "end_positions": np.array([4, 8, 7, 30])}
INPUTS = {"input_ids": IDS, "attention_mask": MASK}

HEADS = {
    "MistralForCausalLM": {"labels": TOKENS},
    "MistralForSequenceClassification": {"labels": CLASSES},
    "MistralForTokenClassification": {"labels": TAGS},
    "MistralForQuestionAnswering": SPANS,
}


def make(kind, *, config=CONFIG, optimizer="sgd", run_eagerly=True, **options):
    kind = getattr(mistral_tf, kind) if isinstance(kind, str) else kind
    model = kind(config).load_arrays(random_parameters(config, kind.architecture))
    model.compile(optimizer, run_eagerly=run_eagerly, **options)
    return model


def losses_of(labels, logits):
    """-log softmax(logits)[label], and which are counted, in NumPy."""
    logits = np.asarray(logits, np.float64)
    counted = labels != -100
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    picked = np.take_along_axis(logits, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return (log_sum - picked) * counted, counted


def accuracy_of(labels, logits, weight=None):
    _, counted = losses_of(labels, logits)
    right = (np.argmax(logits, -1) == labels)[counted]
    return np.average(right, weights=None if weight is None else np.broadcast_to(weight, labels.shape)[counted])


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize("head", HEADS)
def test_fit_starts_from_the_model_s_own_loss_and_lowers_it(head):
    labels = HEADS[head]
    # in a graph where heads differ most: one row of scores, and two
    eagerly = head in ("MistralForSequenceClassification", "MistralForTokenClassification")
    model = make(head, optimizer=keras.optimizers.Adam(1e-2), run_eagerly=eagerly, metrics=["accuracy"])
    before = model(**INPUTS, **labels)
    history = model.fit({**INPUTS, **labels}, batch_size=B, epochs=8, verbose=0).history
    assert history["loss"][0] == pytest.approx(float(before.loss), rel=1e-5)
    assert history["loss"][-1] < history["loss"][0] / 2
    if head == "MistralForQuestionAnswering":
        right = np.argmax(before.start_logits, -1) == SPANS["start_positions"]
        assert history["start_logits_accuracy"][0] == pytest.approx(right[:3].mean())
    elif head == "MistralForCausalLM":
        assert history["accuracy"][0] == pytest.approx(accuracy_of(TOKENS[:, 1:], before.logits[:, :-1]))
    else:
        assert history["accuracy"][0] == pytest.approx(accuracy_of(labels["labels"], before.logits))


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_a_tokenizer_s_output_is_data():
    model = make(MistralForSequenceClassification)
    batch, y = Encoding(INPUTS), CLASSES
    loss = float(model(**INPUTS, labels=y).loss)
    assert model.evaluate(batch, y, verbose=0) == model.test_on_batch(batch, y) == pytest.approx(loss, rel=1e-5)
    logits = model(batch).logits
    assert np.allclose(model.predict(batch, verbose=0).logits, logits, atol=1e-6)
    assert np.allclose(model.predict_on_batch(batch).logits, logits, atol=1e-6)
    history = model.fit(batch, y, validation_data=(batch, y), verbose=0).history
    assert history["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert history["val_loss"][0] == pytest.approx(model.train_on_batch(batch, y), rel=1e-5)


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize("eager", [False, True])
def test_x_y_sample_weight_of_rows_and_of_tokens(eager):
    model = make(MistralForTokenClassification, run_eagerly=eager, weighted_metrics=["accuracy"])
    logits = model(**INPUTS).logits.numpy()
    losses, counted = losses_of(TAGS, logits)
    rows, tokens = RANDOM.uniform(0, 2, B), RANDOM.uniform(0, 2, (B, T))
    for weight, each in ((rows, rows[:, None]), (tokens, tokens)):
        out = model.evaluate(INPUTS, TAGS, sample_weight=weight, batch_size=B, verbose=0, return_dict=True)
        assert out["loss"] == pytest.approx((losses * each).sum() / counted.sum(), rel=1e-5)
        assert out["accuracy"] == pytest.approx(accuracy_of(TAGS, logits, each), rel=1e-5)


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_weights_of_a_language_model_s_tokens_are_those_of_the_labels():
    model = make(MistralForCausalLM)
    losses, counted = losses_of(TOKENS[:, 1:], model(**INPUTS).logits[:, :-1])
    tokens = RANDOM.uniform(0, 2, (B, T))
    found = model.test_on_batch(INPUTS, TOKENS, tokens)
    assert found == pytest.approx((losses * tokens[:, 1:]).sum() / counted.sum(), rel=1e-5)
    assert model.test_on_batch(INPUTS, np.full_like(IDS, -100)) == 0, "nothing to predict"


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize(
    "head", ["MistralForSequenceClassification", "MistralForTokenClassification", "MistralForQuestionAnswering"]
)
def test_weights_beside_labels_by_name(head):
    model = make(head)
    rows = RANDOM.uniform(0, 2, B)
    labels = HEADS[head]
    wanted = model.test_on_batch(INPUTS, tuple(labels.values()) if len(labels) > 1 else labels["labels"], rows)
    assert model.evaluate(INPUTS, labels, sample_weight=rows, batch_size=B, verbose=0) == pytest.approx(
        wanted, rel=1e-6
    )


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize("head", ["MistralForCausalLM", "MistralForTokenClassification"])
def test_losses_and_metrics_by_name_are_of_logits_and_skip_ignored_labels(head):
    name = "sparse_categorical_crossentropy"
    labels = HEADS[head]["labels"]
    model = make(head, loss=name, metrics=[name, "sparse_categorical_accuracy"])
    losses, counted = losses_of(labels, model(**INPUTS).logits)  # a loss by name shifts nothing
    out = model.test_on_batch(INPUTS, labels, return_dict=True)
    assert out["loss"] == pytest.approx(losses.sum() / counted.sum(), rel=1e-5)
    assert out[name] == pytest.approx(losses.sum() / counted.sum(), rel=1e-5)
    assert out["sparse_categorical_accuracy"] == pytest.approx(accuracy_of(labels, model(**INPUTS).logits))


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_many_labels_and_numbers():
    config = CONFIG.replace(problem_type="multi_label_classification")
    model = make(MistralForSequenceClassification, config=config, metrics=["accuracy", "auc", "binary_crossentropy"])
    logits = model(**INPUTS).logits.numpy()
    many = (logits > np.median(logits[logits < 0])).astype(np.float32)  # told apart by negative scores too
    out = model.test_on_batch(INPUTS, many, return_dict=True)
    loss = float(model(**INPUTS, labels=many).loss)
    assert out["loss"] == pytest.approx(loss, rel=1e-5)
    assert out["binary_crossentropy"] == pytest.approx(loss, rel=1e-5)
    assert out["accuracy"] == pytest.approx(((logits > 0) == many).mean())
    assert out["auc"] == pytest.approx(1.0)
    numbers = RANDOM.normal(size=B).astype(np.float32)
    model = make(MistralForSequenceClassification, config=CONFIG.replace(num_labels=1), metrics=["mae"])
    out = model.test_on_batch(INPUTS, numbers, return_dict=True)
    found = model(**INPUTS, labels=numbers)
    assert out["loss"] == pytest.approx(float(found.loss), rel=1e-5)
    assert out["mae"] == pytest.approx(np.abs(found.logits.numpy()[:, 0] - numbers).mean(), rel=1e-5)


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize("name", ["binary_crossentropy", "BinaryCrossentropy", "bce", "BCE"])
def test_every_spelling_of_a_name_is_of_logits(name):
    many = RANDOM.integers(0, 2, (B, CONFIG.num_labels)).astype(np.float32)
    metrics = ["ce" if name == "BCE" else name, "precision", "Recall"]
    config = CONFIG.replace(problem_type="multi_label_classification")
    model = make(MistralForSequenceClassification, config=config, loss={"logits": name}, metrics=metrics)
    scores = model(**INPUTS, labels=many)
    out = model.test_on_batch(INPUTS, many, return_dict=True)
    assert out["loss"] == pytest.approx(float(scores.loss), rel=1e-5)
    assert out["binary_crossentropy"] == pytest.approx(float(scores.loss), rel=1e-5)
    chosen = scores.logits.numpy() > 0
    assert out["precision"] == pytest.approx((chosen * many).sum() / chosen.sum())
    assert out["recall"] == pytest.approx((chosen * many).sum() / many.sum())


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_each_field_has_its_loss_and_its_own_state_of_a_metric():
    name = "SparseCategoricalCrossentropy"
    counted = keras.metrics.SparseCategoricalAccuracy(name="right")
    model = make(MistralForQuestionAnswering, loss={"start_logits": name, "end_logits": name}, metrics=[counted])
    out = model.test_on_batch(INPUTS, SPANS, return_dict=True)
    found = model(**INPUTS)
    for field, positions in zip(("start", "end"), SPANS.values(), strict=True):
        inside = np.where(positions < T, positions, -100)
        losses, counts = losses_of(inside, found[f"{field}_logits"])
        assert out[f"{field}_logits_loss"] == pytest.approx(losses.sum() / counts.sum(), rel=1e-5)
        assert out[f"{field}_logits_right"] == pytest.approx(accuracy_of(inside, found[f"{field}_logits"]))


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_one_hot_labels_and_class_weights():
    model = make(MistralForSequenceClassification, loss="categorical_crossentropy", metrics=["accuracy"])
    logits = model(**INPUTS).logits.numpy()
    losses, _ = losses_of(CLASSES, logits)
    out = model.test_on_batch(INPUTS, keras.utils.to_categorical(CLASSES, CONFIG.num_labels), return_dict=True)
    assert out["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert out["accuracy"] == pytest.approx(accuracy_of(CLASSES, logits))
    model = make(MistralForSequenceClassification)
    weights = {label: 1.0 + label for label in range(CONFIG.num_labels)}
    found = model.train_on_batch(INPUTS, CLASSES, class_weight=weights)
    assert found == pytest.approx((losses * (1 + CLASSES)).mean(), rel=1e-5)


@pytest.mark.feature("compile, fit, evaluate, predict")
@pytest.mark.parametrize(
    "y", [tuple(SPANS.values()), SPANS, dict(zip(["start_logits", "end_logits"], SPANS.values(), strict=True))]
)
def test_answers_come_as_a_pair_or_by_name(y):
    model = make(MistralForQuestionAnswering, metrics={"end_logits": ["accuracy"]})
    out = model.test_on_batch(INPUTS, y, return_dict=True)
    expected = model(**INPUTS, **SPANS)
    assert out["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    right = np.argmax(expected.end_logits, -1) == SPANS["end_positions"]
    assert out["end_logits_accuracy"] == pytest.approx(right[:3].mean())


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_the_body_trains_with_a_loss_and_has_none_of_its_own():
    target = RANDOM.normal(size=(B, T, CONFIG.hidden_size)).astype(np.float32)
    model = make(MistralModel, loss="mse")
    expected = np.square(model(IDS).last_hidden_state - target).mean()
    assert model.train_on_batch(IDS, target) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="no loss of its own"):
        make(MistralModel).train_on_batch(IDS, target)


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_predict_returns_the_model_s_output_for_all_batches():
    model = make(MistralForCausalLM, run_eagerly=False)
    out = model.predict({**INPUTS, "labels": TOKENS}, 3, verbose=0)
    assert np.allclose(out["logits"], model(**INPUTS).logits, atol=2e-5)
    assert out.loss is None
    assert out.past_key_values is None
    assert np.array_equal(model.predict_on_batch(INPUTS).logits.shape, out.logits.shape)
    spans = MistralForQuestionAnswering(CONFIG).predict(IDS, verbose=0)
    assert spans["end_logits"].shape == (B, T)


def of_lengths(*lengths):
    batches = [{"input_ids": IDS[:, :length], "labels": IDS[:, :length]} for length in lengths]
    spec = {name: tf.TensorSpec([None, None], tf.int32) for name in ("input_ids", "labels")}
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec).apply(
        tf.data.experimental.assert_cardinality(len(batches))
    )


def test_a_step_of_fit_is_traced_once():
    """The optimizer's variables are there before: made within a trace, they have it made again."""
    traced = []

    class Counting(MistralForCausalLM):
        def train_step(self, data):
            traced.append(1)
            return super().train_step(data)

    make(Counting, optimizer="adam", run_eagerly=False).fit({"input_ids": IDS, "labels": IDS}, epochs=2, verbose=0)
    assert len(traced) == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # Keras saves so
@pytest.mark.feature("compile, fit, evaluate, predict")
def test_batches_of_several_lengths_are_traced_once_and_callbacks_see_each(tmp_path):
    traced, seen = [], []

    class Counting(MistralForCausalLM):
        def train_step(self, data):
            traced.append(1)
            return super().train_step(data)

    schedule = keras.optimizers.schedules.ExponentialDecay(1e-2, decay_steps=4, decay_rate=0.5)
    model = make(Counting, optimizer=keras.optimizers.Adam(schedule), run_eagerly=False, steps_per_execution=2)
    data = of_lengths(9, 5, 7, 8)
    history = model.fit(
        data,
        epochs=3,
        shuffle=False,  # Keras warns that it cannot shuffle a Dataset
        validation_data=of_lengths(6, 9),
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=1),  # stops, as the loss falls
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
            keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])),
        ],
    ).history
    assert len(history["loss"]) == len(history["val_loss"]) == 2
    assert sum(traced) <= 2, "once, and once more where the number of steps is unknown"
    assert len(seen) == 4, "2 epochs of 2 executions of 2 steps"
    assert not model.jit_compile, "XLA would compile every length anew"
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-2 * 0.5**2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.weights.h5", "2.weights.h5", "best.keras"]
    fresh = MistralForCausalLM(CONFIG)
    fresh.load_weights(tmp_path / "2.weights.h5")
    assert np.allclose(fresh(IDS).logits, model(IDS).logits, atol=1e-6)


@pytest.mark.feature("Freezing: trainable = False")
def test_a_frozen_body_keeps_its_weights():
    model = make(MistralForSequenceClassification)
    model.model.trainable = False
    assert [variable.name for variable in model.trainable_variables] == ["score.weight"]
    before = {name: array.copy() for name, array in model.named_arrays()}
    model.compile(keras.optimizers.Adam(1e-1), run_eagerly=True)
    model.train_on_batch(INPUTS, CLASSES)
    assert {n for n, array in model.named_arrays() if not np.array_equal(array, before[n])} == {"score.weight"}


@pytest.mark.feature("Training step")
def test_weight_decay_leaves_out_norms_by_name():
    optimizer = keras.optimizers.AdamW(0.0, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["norm", "bias"])
    model = make(MistralForTokenClassification, optimizer=optimizer)
    optimizer.build(model.trainable_variables)
    kept = {v.name for v in model.trainable_variables if not optimizer._use_weight_decay(v)}
    assert kept == {name for name, _ in model.named_arrays() if "norm" in name or "bias" in name}
    assert len(kept) == 4


@pytest.mark.feature("compile, fit, evaluate, predict")
def test_losses_added_by_layers_count():
    model = make(MistralForCausalLM)
    own = model.test_on_batch(INPUTS, TOKENS)
    model.lm_head.weight.regularizer = keras.regularizers.L2(1e-2)
    squares = np.square(np.asarray(model.lm_head.weight)).sum()
    assert model.test_on_batch(INPUTS, TOKENS) == pytest.approx(own + 1e-2 * squares, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (INPUTS, None, "labels in the dictionary, or"),
        (IDS, TOKENS[:, :7], r"labels must have the shape \[None, 9\], got \(None, 7\)"),
        (IDS, CLASSES, r"labels must have the shape \[None, 9\], got \(None,\)"),
        (IDS.tolist(), TOKENS, "Unrecognized data type"),
        ({**INPUTS, "entity_ids": IDS}, TOKENS, "entity_ids"),
        (IDS + 0.5, TOKENS, "must be integers"),
    ],
)
def test_mistakes_in_fit_are_told(x, y, message):
    with pytest.raises((InputError, ValueError, TypeError), match=message):
        make(MistralForCausalLM, run_eagerly=False).fit(x, y, verbose=0)


def test_mistakes_in_compile_are_told():
    with pytest.raises(ValueError, match="sparse_crossentropy"):
        make(MistralForCausalLM, loss="sparse_crossentropy").test_on_batch(IDS, IDS)
    with pytest.raises(ValueError, match="list, tuple, or dict"):
        make(MistralForCausalLM, metrics="accuracy")
    with pytest.raises(InputError, match="start_positions and end_positions"):
        make(MistralForQuestionAnswering).test_on_batch({**INPUTS, "start_positions": CLASSES})
