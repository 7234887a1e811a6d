"""Models with adapters (LoRA), compared with the specification: logits, and the gradients of what trains."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mistral_core.arrays import Array
from mistral_core.lora import adapter as files
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import shape_of
from mistral_core.reference import adapters, heads
from mistral_core.reference.gradients import Gradients

from .adapters import learning
from .cases import CAUSAL, PACKED, Case
from .compare import Comparison
from .pieces import Subject, learned, parameters_of

CASE = next(case for case in CAUSAL if case.name == "left-padding")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"target_modules": ("q_proj", "v_proj", "up_proj"), "lora_dropout": 0.5},
    "rslora, dora": {"target_modules": ("k_proj", "down_proj"), "use_rslora": True, "use_dora": True},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
    "saved whole": {"target_modules": ("o_proj",), "modules_to_save": ("lm_head", "1.mlp.gate_proj")},
    "beside nf4": {"target_modules": ("q_proj", "o_proj", "gate_proj")},
    "dora beside int4": {"target_modules": ("v_proj", "down_proj"), "use_dora": True},
}
"""Name -> the fields of a config, beside r and lora_alpha."""
BASES = {"beside nf4": "packed nf4 64", "dora beside int4": "packed int4 32"}
"""Name -> the packed case whose model is the base (QLoRA, arXiv 2305.14314); the others are beside floats."""
R, ALPHA, STD = 3, 12, 0.1


@functools.cache
def case_of(way: str) -> Case:
    """The base's model and a batch with labels."""
    if way not in BASES:
        return CASE
    case = next(case for case in PACKED if case.name == BASES[way])
    return case._replace(inputs={**case.inputs, "labels": case.inputs["input_ids"]})


@functools.cache
def adapter_of(way: str) -> Adapter:
    """An adapter of a seed, whose magnitudes are no row's own length."""
    config, architecture = case_of(way).config, CASE.architecture
    lora = LoraConfig(r=R, lora_alpha=ALPHA, **WAYS[way]).for_model(config, architecture)
    random, found = np.random.default_rng(19), {}
    for name, target in lora.targets(config, architecture).items():
        rows, columns = shape_of(target.row, config)
        a, b = (STD * random.normal(size=shape) for shape in ((R, columns), (rows, R)))
        lengths = random.uniform(1, 2, rows).astype(np.float32) if lora.use_dora else None
        found[name] = LoraWeights(a.astype(np.float32), b.astype(np.float32), lengths)
    saved = {
        name: random.normal(size=shape_of(row, config)).astype(np.float32) / 5
        for name, row in lora.saved(config, architecture)
    }
    return Adapter(lora, found, saved)


@functools.cache
def expected(way: str) -> tuple[Array, Gradients]:
    """Logits, loss and gradients of the specification."""
    case, parameters = case_of(way), parameters_of(case_of(way), "float32")
    config, changed = adapters.beside(case.config, parameters, case.architecture, adapter_of(way))
    logits = heads.causal_lm(config, changed, **case.inputs).logits
    assert logits is not None
    return logits, adapters.adapter_gradients(
        case.config, parameters, case.architecture, adapter_of(way), **case.inputs
    )


def logits(subject: Subject) -> Iterator[Comparison]:
    """Logits of a model with each adapter, read from peft's files, and once it is merged into a base of floats."""
    for way in WAYS:
        model, lora = adapted(subject, way)
        for name in ("beside",) if way in BASES else ("beside", "merged"):
            actual = subject.adapter.call(model, **subject.inputs(case_of(way))).logits
            yield subject.compare(f"{way}, {name}", "logits of an adapter", actual, expected(way)[0])
            if way not in BASES:
                lora.merge(model)


def gradients(subject: Subject) -> Iterator[Comparison]:
    """The loss and each entry of the gradients of all that an adapter trains, and of nothing else."""
    for way in WAYS:
        model, _ = adapted(subject, way)
        found = learning.loss_and_gradients(subject.adapter, model, subject.inputs(case_of(way)))
        yield from learned(subject, way, found, expected(way)[1])


def adapted(subject: Subject, way: str) -> tuple[Any, Any]:
    """A backend's model with an adapter that trains, read from peft's files, and the backend's module of adapters."""
    lora, case = importlib.import_module(f"{subject.adapter.package.__name__}.lora"), case_of(way)
    model = subject.own_model(case)
    with tempfile.TemporaryDirectory() as folder:
        files.save(folder, adapter_of(way), case.config, case.architecture)
        lora.load_adapter(model, folder, is_trainable=True)
    return model, lora
