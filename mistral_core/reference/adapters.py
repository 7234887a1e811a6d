"""What an adapter of low rank makes of a model, and how it learns: its gradients from those of the matrices it changes.

    W' = W + s B A                              LoRA: arXiv 2106.09685, eq. 3, with s = alpha / r
    W' = m V / |V| by rows, V = W + s B A       DoRA: arXiv 2402.09353, eq. 5

A is [r, I] and B is [O, r]; of an embedding [V, D] too, of which a file holds both transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from . import gradients
from .gradients import EMBEDDING, Gradients
from .model import Parameters

if TYPE_CHECKING:
    from ..lora.adapter import Adapter, LoraWeights

FIELDS = ("a", "b", "magnitude")


def changed(weight_OI: Array, low: LoraWeights, scaling: float) -> Array:
    """W', whose rows are as long as the magnitudes where there are any."""
    sum_OI = weight_OI + scaling * low.b.astype(np.float64) @ low.a.astype(np.float64)
    if low.magnitude is None:
        return sum_OI
    return sum_OI * (low.magnitude / row_norms(sum_OI))[:, None]


def row_norms(matrix_OI: Array) -> Array:
    """[O]: the lengths of rows."""
    return np.sqrt((matrix_OI**2).sum(axis=1))


def numbers(adapter: Adapter) -> dict[str, Array]:
    """All that an adapter learns, float64, by names: `<matrix>.a`, `.b`, `.magnitude`, and what is saved whole."""
    found = {
        f"{name}.{field}": array
        for name, low in adapter.weights.items()
        for field, array in zip(FIELDS, low, strict=True)
        if array is not None
    }
    return {name: array.astype(np.float64) for name, array in {**found, **adapter.saved}.items()}


def with_numbers(adapter: Adapter, learned: Mapping[str, Array]) -> Adapter:
    """The adapter with other numbers, by the names of `numbers`."""
    weights = {
        name: low._replace(**{field: learned[f"{name}.{field}"] for field in FIELDS if getattr(low, field) is not None})
        for name, low in adapter.weights.items()
    }
    return adapter._replace(weights=weights, saved={name: learned[name] for name in adapter.saved})


def beside(
    config: MistralConfig, parameters: Parameters, architecture: str, adapter: Adapter
) -> tuple[MistralConfig, dict[str, Array]]:
    """The model that computes what a model and an adapter do; a tied head keeps the base's embedding, as in peft."""
    found = {name: np.asarray(array).astype(np.float64) for name, array in parameters.items()}
    targets = adapter.config.targets(config, architecture)
    unties = config.tie_word_embeddings and architecture == "MistralForCausalLM"
    if unties and EMBEDDING in {*targets, *adapter.saved}:
        config = config.replace(tie_word_embeddings=False)
        found["lm_head.weight"] = found[EMBEDDING]
    found |= {name: array.astype(np.float64) for name, array in adapter.saved.items()}
    for name, target in targets.items():
        found[name] = changed(found[name], adapter.weights[name], target.scaling)
    return config, found


def matrix_gradients(
    weight_OI: Array, low: LoraWeights, scaling: float, dchanged_OI: Array
) -> tuple[Array, Array, Array | None]:
    """dA = s B^T dV, dB = s dV A^T: each product's by the other factor; dV is dW', of DoRA by rows dW' m / |V|.

    And dm = dW' V / |V|, summed by rows; |V| is taken for a constant (arXiv 2402.09353, section 4.3, as in peft).
    """
    a_RI, b_OR, dsum_OI, dmagnitude_O = low.a.astype(np.float64), low.b.astype(np.float64), dchanged_OI, None
    if low.magnitude is not None:
        sum_OI = weight_OI + scaling * b_OR @ a_RI
        norm_O = row_norms(sum_OI)
        dsum_OI = dchanged_OI * (low.magnitude / norm_O)[:, None]
        dmagnitude_O = (dchanged_OI * sum_OI).sum(axis=1) / norm_O
    return scaling * b_OR.T @ dsum_OI, scaling * dsum_OI @ a_RI.T, dmagnitude_O


def adapter_gradients(
    config: MistralConfig, parameters: Parameters, architecture: str, adapter: Adapter, **inputs: Any
) -> Gradients:
    """The loss of a model beside which an adapter is, and the gradients of `numbers`, by the same names."""
    whole, found = beside(config, parameters, architecture, adapter)
    loss, dense = gradients.OF[architecture](whole, found, **inputs)
    learned = {name: dense[name] for name in adapter.saved}
    for name, target in adapter.config.targets(config, architecture).items():
        base = np.asarray(parameters[name]).astype(np.float64)
        own = matrix_gradients(base, adapter.weights[name], target.scaling, dense[name])
        learned |= {f"{name}.{field}": each for field, each in zip(FIELDS, own, strict=True) if each is not None}
    return Gradients(loss, learned)
