"""Models with adapters (LoRA), compared with the specification over matrices into which the same numbers are folded."""

from __future__ import annotations

import functools
import importlib
import math
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
from mistral_core.reference import heads

from .cases import CAUSAL
from .compare import Comparison
from .pieces import Subject, weights

CASE = next(case for case in CAUSAL if case.name == "left-padding")
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"target_modules": ("q_proj", "v_proj", "up_proj"), "lora_dropout": 0.5},
    "rslora, dora": {"target_modules": ("k_proj", "down_proj"), "use_rslora": True, "use_dora": True},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
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
    return Adapter(lora, found)


@functools.cache
def expected(way: str) -> Array:
    """Logits of the specification: W + s B A in the place of W, and of DoRA its rows as long as the magnitudes."""
    parameters = {n: a.astype(float) for n, a in weights(TINY, CASE.architecture, "float32").items()}
    scaling = ALPHA / (math.sqrt(R) if WAYS[way].get("use_rslora") else R)
    for name, (a, b, magnitude) in adapter_of(way).weights.items():
        changed = parameters[name] + scaling * b.astype(float) @ a.astype(float)
        if magnitude is not None:
            changed *= (magnitude / np.sqrt(np.square(changed).sum(1)))[:, None]
        parameters[name] = changed
    logits = heads.causal_lm(TINY, parameters, **CASE.inputs).logits
    assert logits is not None
    return logits


def logits(subject: Subject) -> Iterator[Comparison]:
    """Logits of a model with each adapter, as a backend reads it from peft's files, and once it is merged."""
    lora = importlib.import_module(f"{subject.adapter.package.__name__}.lora")
    for way in WAYS:
        model = subject.model(CASE)
        with tempfile.TemporaryDirectory() as folder:
            files.save(folder, adapter_of(way), TINY, CASE.architecture)
            lora.load_adapter(model, folder)
        for name in ("beside", "merged"):
            actual = subject.adapter.call(model, **subject.inputs(CASE)).logits
            yield subject.compare(f"{way}, {name}", "logits of an adapter", actual, expected(way))
            lora.merge(model)
