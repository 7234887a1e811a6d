"""Models that learn by `mistral_core.training` in each framework: the same numbers, resumed to the bit."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from conformance import adapters
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import ConfigError, MissingTensorsError, NonFiniteLossError, UnsupportedFeatureError
from mistral_core.learning import Examples, Feed
from mistral_core.lora.config import LoraConfig
from mistral_core.quantization.request import Quantization
from mistral_core.reference import heads, ops
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.training import TrainingSettings, train

CONFIG = TINY.replace(
    vocab_size=2048, num_hidden_layers=1, layer_types=None, sliding_window=8, num_labels=3, classifier_dropout=0.0
)
SETTINGS = TrainingSettings(rate=1e-3, epochs=2, eps=1e-6, weight_decay=0.01, warmup=0.2, clip=0.5)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
WORDS = ["Emma", "was", "not", "at", "all", "pleased", "with", "what", "Harriet", "had", "said", "evening"]
KINDS = {
    "text": "MistralForCausalLM",
    "preference": "MistralForCausalLM",
    "classification": "MistralForSequenceClassification",
    "tokens": "MistralForTokenClassification",
}
pytestmark = pytest.mark.lenient_jax("optax's Adam mixes dtypes")


def row(kind, rng):
    words = list(map(str, rng.choice(WORDS, rng.integers(3, 9))))
    text = " ".join(words)
    return {
        "text": {"text": text},
        "preference": {"prompt": text, "chosen": " It was so.", "rejected": " Nothing " + words[0]},
        "classification": {"text": text, "label": ["a", "b", "c"][len(words) % 3]},
        "tokens": {"tokens": words, "labels": [["a", "b", "c"][len(word) % 3] for word in words]},
    }[kind]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Examples of each kind, few and the same for all frameworks."""
    tokenizer, found = MistralTokenizer.from_pretrained(TINY_CHECKPOINT), {}
    for kind in KINDS:
        rng = np.random.default_rng(1)
        path = tmp_path_factory.mktemp("data") / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row(kind, rng)) + "\n" for _ in range(12)))
        labels = ["a", "b", "c"] if kind in ("classification", "tokens") else None
        found[kind] = Examples(path, tokenizer, length=32, labels=labels)
    return found


def name_of(backend):
    return backend.__name__.removeprefix("mistral_")


def built(backend, config=CONFIG, architecture="MistralForCausalLM", dtype="float32"):
    """A small random model."""
    parameters, adapter = random_parameters(config, architecture), adapters.get(name_of(backend))
    return adapter.model(architecture, config, parameters, dtype, adapter.implementations[0])


def made(backend, kind="text", *, lora=LORA, dtype="float32", config=CONFIG, settings=SETTINGS, packed=None):
    """A learner of a small random model."""
    architecture = KINDS[kind]
    model = built(backend, config, architecture, dtype)
    if packed is not None:
        model = importlib.import_module(f"{backend.__name__}.quantize").quantize(model, Quantization(packed, 16))
    train = importlib.import_module(f"{backend.__name__}.train")
    if lora is not None:
        model = importlib.import_module(f"{backend.__name__}.lora").add_adapter(model, lora)
    return train.Learner(model, settings, objective="preferences" if kind == "preference" else "labels")


def feed(data, kind="text"):
    return Feed(data[kind], rows=2, accumulate=2, seed=0)


def losses(directory):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line.get("loss"), line.get("norm"), line.get("validation_loss")) for line in found]


SEEN: dict[tuple[str, str], tuple[list, dict]] = {}
"""Kind and what learns -> what the first framework gave, with which the others are compared."""


@pytest.mark.feature("Training: all weights, LoRA, QLoRA, DPO")
@pytest.mark.others(learns=("text, all", "text, nf4", "preference, adapter", "classification, all", "tokens, adapter"))
@pytest.mark.parametrize(
    "learns",
    [
        "text, all", "text, adapter", "text, nf4", "preference, adapter", "preference, int4",
        "classification, all", "classification, adapter", "tokens, all", "tokens, adapter",
    ],
)  # fmt: skip
def test_frameworks_learn_the_same(backend, data, tmp_path, learns):
    kind, what = learns.split(", ")
    packed = what if what in ("nf4", "int4") else None
    learner = made(backend, kind, lora=None if what == "all" else LORA, packed=packed)
    train(learner, feed(data, kind), tmp_path / "run", settings=SETTINGS, validation=data[kind])
    found, arrays = losses(tmp_path / "run"), learner.arrays()
    first, others = SEEN.setdefault((kind, what), (found, arrays))
    assert len(found) == len(first)
    for one, other in zip(found, first, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine == theirs or abs(mine - theirs) <= 2e-5 * abs(theirs)
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32
        scale = np.abs(others[name]).max() or 1
        assert np.abs(array - others[name]).max() <= 1e-3 * scale, name
    shares = [json.loads(line).get("right") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= share <= 1 for share in shares if share is not None)
    assert any(share is not None for share in shares) == (kind == "preference")
    step = next(feed(data, kind).steps())
    if (kind, what) == ("text", "all"):
        parameters = random_parameters(CONFIG, KINDS[kind])
        parts = [
            heads.causal_lm(CONFIG, parameters, **each.arguments(), num_items_in_batch=step.num_items_in_batch).loss
            for each in step.batches
        ]
        assert np.isclose(found[0][0], float(sum(parts)), rtol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.others(case=("bfloat16", "dropout"))
@pytest.mark.parametrize("case", ["all", "bfloat16", "dropout"])
def test_a_killed_run_is_resumed_to_the_bit(backend, data, tmp_path, case):
    lora, config = None, CONFIG
    if case == "dropout":
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "down_proj"), lora_dropout=0.3)
        config = CONFIG.replace(attention_dropout=0.2)
    settings = TrainingSettings(rate=1e-2, epochs=3, evaluate_every=2, seed=5)

    def learner():
        found = made(
            backend, lora=lora, config=config, settings=settings, dtype="bfloat16" if case == "bfloat16" else "float32"
        )
        if case == "dropout":
            found.model.gradient_checkpointing_enable()
        return found

    def kill(line):
        if line["step"] == 3:
            raise Killed

    train(learner(), feed(data), tmp_path / "whole", settings=settings, validation=data["text"])
    with pytest.raises(Killed):
        train(learner(), feed(data), tmp_path / "parts", settings=settings, validation=data["text"], told=kill)
    resumed = learner()
    train(resumed, feed(data), tmp_path / "parts", settings=settings, validation=data["text"], resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    names = ["adapter_model.safetensors"] if lora else ["model.safetensors"]
    for folder in ("best", "final"):
        for name in names:
            one, other = ((tmp_path / run / folder / name).read_bytes() for run in ("whole", "parts"))
            assert one == other, folder
    if case == "dropout":  # and checkpointing, under which adapters of a frozen base have been seen to stay 0
        for name, array in resumed.arrays().items():
            if name.startswith("weights.") and name.endswith(".b"):
                assert np.abs(array).max() > 0, f"{name} has learnt nothing"


def test_rows_of_one_batch_are_those_of_several(backend, data, tmp_path):
    found = []
    for rows, accumulate in ((4, 1), (1, 4)):
        learner, settings = made(backend), TrainingSettings(rate=1e-3, epochs=2, eps=1e-6)
        steps = Feed(data["text"], rows=rows, accumulate=accumulate, seed=0)
        train(learner, steps, tmp_path / str(rows), settings=settings)
        found.append(losses(tmp_path / str(rows)))
    for one, other in zip(*found, strict=True):
        assert np.allclose(one[:2], other[:2], rtol=1e-5)


def test_weights_of_bfloat16_learn_in_float32(backend, data):
    settings = TrainingSettings(rate=1e-5, epochs=1, schedule="constant", warmup=0)
    learner = made(backend, lora=None, dtype="bfloat16", settings=settings)
    before = {name: array.copy() for name, array in learner.arrays().items()}
    for number, step in enumerate(feed(data).steps(epochs=3)):
        batches = [batch.arguments() for batch in step.batches]
        assert learner.step(batches, items=step.num_items_in_batch, rate=1e-5, number=number).is_finite
    own = dict(learner.model.named_arrays())
    moved = 0
    for name, array in learner.arrays().items():
        moment, _, of = name.partition(".")
        if moment == "weights":
            moved += int((array != before[name]).sum())
            assert own[of].dtype == "bfloat16"
            assert np.array_equal(own[of], array.astype("bfloat16")), of
            assert (np.abs(array - before[name]) <= 1e-4).all()
    assert moved > 1000, "steps smaller than those of bfloat16 add up"


def test_nothing_moves_where_a_loss_is_no_number(backend, data, tmp_path):
    learner = made(backend, lora=None)
    learner.model.set_parameter("model.norm.weight", np.full(CONFIG.hidden_size, np.nan, np.float32))
    learner = type(learner)(learner.model, SETTINGS)
    before = learner.arrays()
    with pytest.raises(NonFiniteLossError, match="in step 1 the loss is nan"):
        train(learner, feed(data), tmp_path / "run", settings=SETTINGS)
    for name, array in learner.arrays().items():
        assert np.array_equal(array, before[name], equal_nan=True), name


def test_a_run_is_resumed_in_another_framework(backend, data, tmp_path):
    settings = TrainingSettings(rate=1e-3, epochs=4, eps=1e-6, save_every=2)
    begun = made(importlib.import_module("mistral_torch"), settings=settings)
    stop = iter([False, True])
    told = train(begun, feed(data), tmp_path / "run", settings=settings, stop=lambda: next(stop))
    assert told.ended == "stopped"
    train(made(backend, settings=settings), feed(data), tmp_path / "run", settings=settings, resume=True)
    found = losses(tmp_path / "run")
    first, _ = SEEN.setdefault(("resumed", "adapter"), (found, {}))
    assert np.allclose([loss for loss, _, _ in found], [loss for loss, _, _ in first], rtol=1e-5)


def test_what_cannot_learn_is_refused(backend, data):
    with pytest.raises(UnsupportedFeatureError, match="preferences are of a language model with an adapter"):
        made(backend, "preference", lora=None)
    with pytest.raises(UnsupportedFeatureError, match="float16 small gradients are lost"):
        made(backend, dtype="float16")
    learner = made(backend)
    with pytest.raises(MissingTensorsError, match="3 tensors are missing|tensors are missing"):
        learner.restore({}, steps=1)
    with pytest.raises(ConfigError, match="objective"):
        type(learner)(learner.model, SETTINGS, objective="rewards")
    quantize = importlib.import_module(f"{backend.__name__}.quantize")
    packed = quantize.quantize(built(backend), "int8")
    with pytest.raises(UnsupportedFeatureError, match="packed matrices do not learn"):
        type(learner)(packed, SETTINGS)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_loss_of_preferences_is_the_reference_s(backend, beta):
    losses = importlib.import_module(f"{backend.__name__}.losses")
    adapter, rng = adapters.get(name_of(backend)), np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5, 11)).astype(np.float32), rng.integers(0, 11, (6, 5))
    labels[0, 2:], labels[2], labels[5] = -100, -100, -100
    exact = ops.label_log_probability(logits.astype(np.float64), labels)
    found = losses.label_log_probability(
        backend_array(backend, logits), backend_array(backend, labels.astype(np.int32))
    )
    assert np.abs(adapter.numpy(found) - exact).max() < 1e-5
    before = rng.normal(size=6).astype(np.float32)
    counted = (labels != -100).any(-1)
    wanted = ops.preference_loss(exact, before.astype(np.float64), counted, beta=beta)
    got = losses.preference_loss(found, backend_array(backend, before), backend_array(backend, counted), beta=beta)
    assert [int(adapter.numpy(each)) for each in got[1:]] == [int(each) for each in wanted[1:]]
    assert abs(float(adapter.numpy(got[0])) - wanted[0]) < 1e-5
    margins = beta * ((exact - before)[:3] - (exact - before)[3:])
    assert np.isclose(wanted[0], -np.log(1 / (1 + np.exp(-margins[:2]))).sum())


def backend_array(backend, array):
    return importlib.import_module(f"{backend.__name__}.arrays").from_numpy(array)
