"""The specification's gradients against central differences of the specification, and errors planted in them."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest

from conformance.adapter_pieces import WAYS
from conformance.cases import CAUSAL, HEADS, padded
from conformance.pieces import REFERENCE
from conformance.weights import random_parameters
from mistral_core.config.presets import TINY
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import shape_of
from mistral_core.reference import adapters, gradients, heads

CASES = {case.name: case for case in (*CAUSAL, *HEADS) if {"labels", "start_positions"} & case.inputs.keys()}
STEP = 3e-6
FAR = 1e-8
"""Of the length of a parameter's gradient: a difference is wrong by STEP^2 times a third derivative and by 1e-16 / STEP
of the loss. Measured: 2.6e-9 at most."""
SMALL = TINY.replace(
    vocab_size=11, hidden_size=6, intermediate_size=5, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, sliding_window=3, num_labels=3,
)  # fmt: skip
IDS = np.random.default_rng(2).integers(1, SMALL.vocab_size, (2, 7))
LABELS = np.where(np.arange(14).reshape(2, 7) % 5 == 2, -100, IDS[:, ::-1])
HOLES = np.array([[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]])
DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])


def inputs_of(case):
    """The inputs of a case, floats in float64."""
    return {
        name: x.astype(np.float64) if getattr(x, "dtype", None) == np.float32 else x for name, x in case.inputs.items()
    }


def exact(config, architecture):
    return {name: array.astype(np.float64) for name, array in random_parameters(config, architecture).items()}


def difference(loss, values, name, direction):
    """The slope of a loss of arrays by name, along a direction of one of them."""
    ahead, behind = (float(loss({**values, name: values[name] + way * STEP * direction})) for way in (1, -1))
    return (ahead - behind) / (2 * STEP)


def apart(loss, values, found):
    """How far gradients are from a difference along a random direction of length 1, of their own length, the worst."""
    random, worst = np.random.default_rng(7), 0.0
    largest = max(np.linalg.norm(gradient) for gradient in found.values())
    assert largest > 1e-3
    for name, gradient in found.items():
        assert gradient.shape == values[name].shape
        direction = random.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        slope = difference(loss, values, name, direction)
        # what is exactly 0 (a bias before a softmax over all places) has no length of its own
        length = max(np.linalg.norm(gradient), 0.01 * largest)
        worst = max(worst, abs(slope - (gradient * direction).sum()) / length)
    return worst


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_every_case(name):
    case = CASES[name]
    inputs, parameters = inputs_of(case), exact(case.config, case.architecture)
    specification = REFERENCE[case.architecture]
    loss, found = gradients.OF[case.architecture](case.config, parameters, **inputs)
    assert loss == specification(case.config, parameters, **inputs).loss
    assert found.keys() == parameters.keys()
    assert apart(lambda values: specification(case.config, values, **inputs).loss, parameters, found) < FAR


@pytest.mark.parametrize(
    ("inputs", "changes"),
    [
        ({"attention_mask": HOLES, "num_items_in_batch": 5}, {}),
        ({"document_ids": DOCUMENTS}, {"tie_word_embeddings": True}),
    ],
    ids=["holes", "documents, tied"],
)
def test_every_entry_of_a_small_model(inputs, changes):
    config = SMALL.replace(**changes)
    parameters = exact(config, "MistralForCausalLM")
    _, found = gradients.causal_lm(config, parameters, IDS, labels=LABELS, **inputs)

    def loss(values):
        return heads.causal_lm(config, values, IDS, labels=LABELS, **inputs).loss

    largest = max(np.abs(gradient).max() for gradient in found.values())
    for name, gradient in found.items():
        slopes = np.empty(gradient.shape)
        for index in np.ndindex(gradient.shape):
            direction = np.zeros(gradient.shape)
            direction[index] = 1
            slopes[index] = difference(loss, parameters, name, direction)
        assert np.abs(slopes - gradient).max() < FAR * largest, name


def test_parts_of_a_step_add_up():
    parameters = exact(SMALL, "MistralForCausalLM")
    count = int((LABELS[:, 1:] != -100).sum())
    _, whole = gradients.causal_lm(SMALL, parameters, IDS, labels=LABELS)
    parts = [
        gradients.causal_lm(SMALL, parameters, IDS[[row]], labels=LABELS[[row]], num_items_in_batch=count).by_name
        for row in range(2)
    ]
    for name, gradient in whole.items():
        assert np.allclose(parts[0][name] + parts[1][name], gradient, rtol=1e-12, atol=1e-15)


def test_nothing_counted_is_no_gradient():
    parameters = exact(SMALL, "MistralForCausalLM")
    loss, found = gradients.causal_lm(SMALL, parameters, IDS, labels=np.full_like(IDS, -100))
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())


# Adapters

FURTHER = {
    "both ends saved whole": {
        "target_modules": ("q_proj",),
        "modules_to_save": ("lm_head", "embed_tokens", "1.mlp.up_proj"),
    },
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    "a tied head is the base's": {"target_modules": ("embed_tokens", "k_proj")},
    "a tied embedding saved whole": {"target_modules": ("k_proj",), "modules_to_save": ("embed_tokens",)},
    "a head with a bias": {"target_modules": ("score", "o_proj"), "use_dora": True},
    "a head saved whole": {"target_modules": "all-linear"},
}


def adapter_of(way):
    """A model's config, class and inputs, and an adapter of it that changes much."""
    config = TINY.replace(tie_word_embeddings="tied" in way, num_hidden_layers=2)
    architecture = (
        "MistralForTokenClassification" if "head with" in way or "head saved" in way else "MistralForCausalLM"
    )
    fields = {"r": 3, "lora_alpha": 12, **{**WAYS, **FURTHER}[way]}
    lora = LoraConfig(**fields).for_model(config, architecture)
    random, weights = np.random.default_rng(5), {}
    for name, target in lora.targets(config, architecture).items():
        rows, columns = shape_of(target.row, config)
        a, b = (0.1 * random.normal(size=shape) for shape in ((target.r, columns), (rows, target.r)))
        weights[name] = LoraWeights(a, b, random.uniform(1, 2, rows) if lora.use_dora else None)
    saved = {
        name: random.normal(size=shape_of(row, config)) / 5 for name, row in lora.saved(config, architecture)
    }  # fmt: skip
    labels = CASES["left-padding" if architecture == "MistralForCausalLM" else "token"].inputs["labels"]
    inputs = {"input_ids": CASES["left-padding"].inputs["input_ids"], "attention_mask": padded("left")}
    return config, architecture, {**inputs, "labels": labels}, Adapter(lora, weights, saved)


@pytest.mark.parametrize("way", [*WAYS, *FURTHER])
def test_every_number_of_an_adapter(way):
    config, architecture, inputs, adapter = adapter_of(way)
    parameters = exact(config, architecture)
    values = adapters.numbers(adapter)
    targets = adapter.config.targets(config, architecture)
    lengths = {
        name: adapters.row_norms(parameters[name] + targets[name].scaling * low.b @ low.a)
        for name, low in adapter.weights.items()
    }

    def loss(values):
        """Of lengths of rows that stay what they are."""
        now = adapters.with_numbers(adapter, values)
        plain = {name: low._replace(magnitude=None) for name, low in now.weights.items()}
        whole, found = adapters.beside(config, parameters, architecture, now._replace(weights=plain))
        for name, low in now.weights.items():
            if low.magnitude is not None:
                found[name] = found[name] * (low.magnitude / lengths[name])[:, None]
        return REFERENCE[architecture](whole, found, **inputs).loss

    value, found = adapters.adapter_gradients(config, parameters, architecture, adapter, **inputs)
    assert np.isclose(value, loss(values), rtol=1e-14)
    assert found.keys() == values.keys()
    assert apart(loss, values, found) < FAR


# Errors planted in what is tested here

PLANTED = {
    gradients: (
        ("n_BTD * np.mean(", "np.mean("),
        ("keepdims=True)) / rms", "keepdims=True))"),
        ("-sin_BTH", "sin_BTH"),
        ("(dweights * weights).sum(axis=-1, keepdims=True)", "0"),
        ("/ np.sqrt(H)", ""),
        ("K, groups, H).sum(axis=3)", "groups, K, H).sum(axis=2)"),
        ("(1 + x * (1 - s))", "(1 + x)"),
        ("from_gate_BTD + from_up_BTD", "from_up_BTD"),
        ("dgate_FD, dup_FD", "dup_FD, dgate_FD"),
        ("np.add.at(dweight_VD, ids_BT, dx_BTD)", "dweight_VD[ids_BT] = dx_BTD"),
        ("np.where(counted[..., None], dlogits, 0)", "dlogits"),
        ("ops.scale_queries(dq_BTNH, step.query_scale_BT)", "dq_BTNH"),
        ("config.layer_windows[layer]", "None"),
        ("dm_BTD = dy_BTD + through_BTD", "dm_BTD = through_BTD"),
        ("found.get(name, 0) + dhead_VD", "dhead_VD"),
        ("np.stack(dscores_BT, axis=-1) / 2", "np.stack(dscores_BT, axis=-1)"),
        ("logistic(logits) - labels", "ops.silu(logits) - labels"),
        ("2 * (predictions - labels)", "predictions - labels"),
    ),
    adapters: (
        ("scaling * b_OR.T", "b_OR.T"),
        ("(low.magnitude / norm_O)[:, None]", "low.magnitude[:, None]"),
        (".sum(axis=1) / norm_O", ".sum(axis=1)"),
    ),
}
SEEN_IN = ("window", "query-scale", "tied", "sequence-numbers", "sequence-many", "question")
ADAPTERS_SEEN_IN = ("plain", "rslora, dora")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, *edit) for module, edits in PLANTED.items() for edit in edits],
    ids=lambda value: "" if inspect.ismodule(value) else value,
)
def test_a_planted_error_is_seen(module, old, new, monkeypatch):
    source = inspect.getsource(module)
    assert source.count(old) == 1
    mutant = type(sys)(module.__name__ + "_mutant")
    mutant.__package__ = module.__package__
    monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
    exec(compile(source.replace(old, new), "<planted>", "exec"), mutant.__dict__)
    monkeypatch.setitem(globals(), module.__name__.rpartition(".")[2], mutant)
    check, names = (
        (test_every_parameter_of_every_case, SEEN_IN)
        if module.__name__.endswith("gradients")
        else (test_every_number_of_an_adapter, ADAPTERS_SEEN_IN)
    )
    for name in names:
        try:
            check(name)
        except AssertionError:
            return
    pytest.fail("no case sees it")
