"""Packing a model by the text it reads: layer after layer, each matrix by what it is multiplied with there.

One layer's weights are in memory at a time, and two arrays of all texts' states. Text goes through the layers as they
are packed, so that each makes up for the ones before it (arXiv 2210.17323, section 4).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..parameters import LM_HEAD, shapes
from ..reference import ops
from ..reference.model import Step
from ..telling import warn
from . import forward, gptq, rounding
from .matrix import PackedMatrix, dequantised
from .request import Quantization

_UNTOLD: Any = {"over": "ignore", "invalid": "ignore"}
"""`gptq.factors` tells of inputs that are not finite, and of which matrix."""
_NORMS = ("input_layernorm", "post_attention_layernorm")

Progress = Callable[[int, int, float], None]
"""Called with matrices that are done, how many there are, and the seconds that the others will probably take."""


def kept_bytes(config: MistralConfig, tokens: int) -> int:
    """Bytes of the states that are kept of so many tokens while a model is calibrated."""
    widest = max(config.num_attention_heads * config.head_dim, config.intermediate_size)
    return tokens * (config.hidden_size + widest) * 4


def packed(
    config: MistralConfig,
    parameters: Mapping[str, Array],
    ids: Array,
    quantization: Quantization,
    *,
    architecture: str = "MistralForCausalLM",
    progress: Progress | None = None,
) -> Iterator[tuple[str, PackedMatrix]]:
    """Yield (name, matrix) of all that `quantization`, which is resolved, packs, in the table's order.

    `parameters` are arrays by canonical name, each asked for once: `weights.lazy` reads them of a checkpoint. `ids`
    [N, T] are texts without padding, of which `kept_bytes` are kept in memory. The same arguments give the same bytes.
    Raises NonFiniteWeightsError, NonFiniteInputError (a name and a text that makes its inputs so), TokenIdError,
    EmptyInputError; warns where there are fewer tokens than a matrix has columns.
    """
    ids = forward.checked_ids(config, ids)
    names = list(quantization.matrices(config, architecture))
    widest = max(shapes(config, architecture)[name][1] for name in names)
    if ids.size < widest:
        warn(f"{ids.size} tokens calibrate matrices of {widest} columns; take a text of more than {widest} tokens.")
    told = _Told(names, shapes(config, architecture), progress)
    for name, matrix in _packed(config, parameters, ids, quantization, names):
        told.done(name)
        yield name, matrix


class _Told:
    """How much is done, by the numbers of the matrices."""

    def __init__(self, names: list[str], sizes: Mapping[str, tuple[int, ...]], progress: Progress | None) -> None:
        self._sizes, self._progress, self._count, self._size = sizes, progress, 0, 0
        self._total, self._all = len(names), sum(math.prod(sizes[name]) for name in names)
        self._start = time.monotonic()

    def done(self, name: str) -> None:
        self._count, self._size = self._count + 1, self._size + math.prod(self._sizes[name])
        if self._progress is not None:
            seconds = (time.monotonic() - self._start) * (self._all / self._size - 1)
            self._progress(self._count, self._total, seconds)


def _packed(
    config: MistralConfig, parameters: Mapping[str, Array], ids: Array, quantization: Quantization, names: list[str]
) -> Iterator[tuple[str, PackedMatrix]]:
    x_NTD = forward.embedded(parameters, ids)
    step = forward.step_of(config, ids.shape[1])
    for layer in range(config.num_hidden_layers):
        yield from _Layer(config, parameters, layer, step, quantization).matrices(x_NTD)
    if LM_HEAD in names:
        yield LM_HEAD, quantization.quantise(LM_HEAD, parameters[LM_HEAD])


class _Layer:
    """A decoder layer that is being packed: what it has read and what it has packed, as float32."""

    def __init__(
        self,
        config: MistralConfig,
        parameters: Mapping[str, Array],
        layer: int,
        step: Step,
        quantization: Quantization,
    ) -> None:
        self._config, self._parameters, self._layer, self._step = config, parameters, layer, step
        self._quantization = quantization
        self._weights = {name: forward.floats(parameters, self._full(name)) for name in _NORMS}

    def matrices(self, x_NTD: Array) -> Iterator[tuple[str, PackedMatrix]]:
        """Yield (name, matrix) in the table's order; `x_NTD` becomes what the packed layer makes of it."""
        batches = forward.batches_of(*x_NTD.shape[:2])

        def normed(name: str) -> Callable[[slice], Array]:
            return lambda part: ops.rms_norm(x_NTD[part], self._weights[name], self._config.rms_norm_eps)

        yield from self._with_inputs(
            normed(_NORMS[0]), batches, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
        )
        mixed_NTM = _of_all(lambda part: self._mixed(normed(_NORMS[0])(part)), batches)
        yield from self._with_inputs(mixed_NTM.__getitem__, batches, "self_attn.o_proj")
        self._add(x_NTD, mixed_NTM, batches, "self_attn.o_proj")
        del mixed_NTM
        yield from self._with_inputs(normed(_NORMS[1]), batches, "mlp.gate_proj", "mlp.up_proj")
        gated_NTF = _of_all(lambda part: self._gated(normed(_NORMS[1])(part)), batches)
        yield from self._with_inputs(gated_NTF.__getitem__, batches, "mlp.down_proj")
        self._add(x_NTD, gated_NTF, batches, "mlp.down_proj")

    def _full(self, name: str) -> str:
        return f"model.layers.{self._layer}.{name}.weight"

    def _with_inputs(
        self, inputs: Callable[[slice], Array], batches: list[slice], *names: str
    ) -> Iterator[tuple[str, PackedMatrix]]:
        """Matrices that are multiplied with the same inputs."""
        found = gptq.factors(_hessian(map(inputs, batches)), name=" and ".join(map(self._full, names)))
        for name in names:
            stored = np.asarray(self._parameters[self._full(name)])
            matrix = _calibrated(self._full(name), stored, found, self._quantization)
            self._weights[name] = dequantised(matrix)
            yield self._full(name), matrix

    def _mixed(self, h_BTD: Array) -> Array:
        return forward.mixed(self._config, self._weights.__getitem__, self._layer, h_BTD, self._step)

    def _gated(self, h_BTD: Array) -> Array:
        gate = ops.silu(ops.linear(h_BTD, self._weights["mlp.gate_proj"]))
        gate *= ops.linear(h_BTD, self._weights["mlp.up_proj"])
        return gate

    def _add(self, x_NTD: Array, inputs: Array, batches: list[slice], name: str) -> None:
        with np.errstate(**_UNTOLD):
            for part in batches:
                x_NTD[part] += ops.linear(inputs[part], self._weights[name])


def _of_all(function: Callable[[slice], Array], batches: list[slice]) -> Array:
    """What a function gives for every batch, as one array [N, T, ...]."""
    result: list[Array] = []
    with np.errstate(**_UNTOLD):
        for part in batches:
            found = function(part)
            result = result or [np.empty((batches[-1].stop, *found.shape[1:]), found.dtype)]
            result[0][part] = found
    return result[0]


def _hessian(inputs: Iterable[Array]) -> Array:
    """X^T X [I, I] of all inputs: products of some thousand tokens in float32, their sum in float64."""
    total: Array | None = None
    with np.errstate(**_UNTOLD):
        for x_BTI in inputs:
            rows = x_BTI.reshape(-1, x_BTI.shape[-1])
            product = rows.T @ rows
            total = product.astype(np.float64) if total is None else np.add(total, product, out=total)
    assert total is not None
    return total


def _calibrated(name: str, stored: Array, found: gptq.Factors, quantization: Quantization) -> PackedMatrix:
    rounding.check_finite(name, stored)
    kind, group, symmetric = quantization.of(name, stored.shape[1])
    scale, zero = gptq.scales(stored, found, kind, group, symmetric=symmetric, dtype=stored.dtype)
    if quantization.double_quant:
        scale = rounding.doubled(scale)  # before the codes, which make up for it
    return gptq.calibrated(stored, found, kind, group, scale, zero)
