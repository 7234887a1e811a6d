"""Models with adapters (LoRA), compared with the specification: logits, and the gradients of what trains."""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mistral_core.arrays import Array
from mistral_core.config.presets import TINY
from mistral_core.lora import adapter as files
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import shape_of
from mistral_core.reference import adapters, heads
from mistral_core.reference.gradients import Gradients

from .adapters import learning
from .cases import CAUSAL
from .compare import Comparison
from .pieces import Subject, learned, weights

CASE = next(case for case in CAUSAL if case.name == "left-padding")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"target_modules": ("q_proj", "v_proj", "up_proj"), "lora_dropout": 0.5},
    "rslora, dora": {"target_modules": ("k_proj", "down_proj"), "use_rslora": True, "use_dora": True},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
    "saved whole": {"target_modules": ("o_proj",), "modules_to_save": ("lm_head", "1.mlp.gate_proj")},
}
"""Name -> the fields of a config, beside r and lora_alpha."""
R, ALPHA, STD = 3, 12, 0.1


@functools.cache
def adapter_of(way: str) -> Adapter:
    """An adapter of a seed, whose magnitudes are no row's own length."""
    lora = LoraConfig(r=R, lora_alpha=ALPHA, **WAYS[way]).for_model(TINY, CASE.architecture)
    random, found = np.random.default_rng(19), {}
    for name, target in lora.targets(TINY, CASE.architecture).items():
        rows, columns = shape_of(target.row, TINY)
        a, b = (STD * random.normal(size=shape) for shape in ((R, columns), (rows, R)))
        lengths = random.uniform(1, 2, rows).astype(np.float32) if lora.use_dora else None
        found[name] = LoraWeights(a.astype(np.float32), b.astype(np.float32), lengths)
    saved = {
        name: random.normal(size=shape_of(row, TINY)).astype(np.float32) / 5
        for name, row in lora.saved(TINY, CASE.architecture)
    }
    return Adapter(lora, found, saved)


@functools.cache
def expected(way: str) -> tuple[Array, Gradients]:
    """Logits, loss and gradients of the specification."""
    parameters = weights(TINY, CASE.architecture, "float32")
    config, changed = adapters.beside(TINY, parameters, CASE.architecture, adapter_of(way))
    logits = heads.causal_lm(config, changed, **CASE.inputs).logits
    assert logits is not None
    return logits, adapters.adapter_gradients(TINY, parameters, CASE.architecture, adapter_of(way), **CASE.inputs)


def logits(subject: Subject) -> Iterator[Comparison]:
    """Logits of a model with each adapter, as a backend reads it from peft's files, and once it is merged."""
    for way in WAYS:
        model, lora = adapted(subject, way)
        for name in ("beside", "merged"):
            actual = subject.adapter.call(model, **subject.inputs(CASE)).logits
            yield subject.compare(f"{way}, {name}", "logits of an adapter", actual, expected(way)[0])
            lora.merge(model)


def gradients(subject: Subject) -> Iterator[Comparison]:
    """The loss and each entry of the gradients of all that an adapter trains, and of nothing else."""
    for way in WAYS:
        model, _ = adapted(subject, way)
        found = learning.loss_and_gradients(subject.adapter, model, subject.inputs(CASE))
        yield from learned(subject, way, found, expected(way)[1])


def adapted(subject: Subject, way: str) -> tuple[Any, Any]:
    """A backend's model with an adapter that trains, read from peft's files, and the backend's module of adapters."""
    lora = importlib.import_module(f"{subject.adapter.package.__name__}.lora")
    model = subject.model(CASE)
    with tempfile.TemporaryDirectory() as folder:
        files.save(folder, adapter_of(way), TINY, CASE.architecture)
        lora.load_adapter(model, folder, is_trainable=True)
    return model, lora
