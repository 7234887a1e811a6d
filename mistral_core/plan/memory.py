"""Bytes of one device by kind.

Exact, from the table of parameters: what is held of parameters, gradients, moments and cache. An estimate, from what
the formulas of a layer keep: activations, and the copies that are made while a layer computes. What the compiler, the
allocator and the libraries take is not known here, and `devices.RESERVE` is kept free for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..generation.cache_layout import layer_slots
from .collectives import Collective, collectives
from .workload import DTYPES, FLOAT, OPTIMIZERS, Held, Workload

EXACT = ("parameters", "gradients", "optimizer", "cache")
ESTIMATED = ("activations", "copies")


@dataclass(frozen=True)
class Plan:
    """Bytes of one device by kind, and what it sends in a step; one device is as all others."""

    workload: Workload
    parameters: int
    """Weights, packed ones as codes and scales, and adapters."""
    gradients: int
    """Of all that trains, in the dtype of the parameters, as when the last of them has been computed."""
    optimizer: int
    """Moments, and the master weights; counters of steps are left out."""
    cache: int
    """Keys, values, their scales in int8, and the lengths."""
    activations: int
    """An estimate: what forward keeps for backward, or in inference what one layer computes with."""
    copies: int
    """An estimate: weights that are gathered over fsdp, their gradients before they are shared out, and one matrix of
    those that are packed as floats."""
    collectives: tuple[Collective, ...]

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return sum(self.bytes.values())

    @property
    def bytes(self) -> dict[str, int]:
        """Kind -> bytes of one device."""
        return {kind: getattr(self, kind) for kind in (*EXACT, *ESTIMATED)}

    @property
    def mesh(self) -> Mapping[str, int]:
        """The mesh of devices."""
        return self.workload.sharding.mesh

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return math.prod(self.mesh.values())


def plan(config: MistralConfig, mesh: Mapping[str, int], **options: Any) -> Plan:
    """What a step of training, or inference, needs on each device of a mesh.

    `options`, all optional: `rules` as `Sharding.of` takes them; `architecture`; `dtype` of parameters and activations
    (bfloat16); `batch`, rows of all devices together (1); `sequence`, tokens of a row (4096), in inference the prompt
    and the answer together; `optimizer`, one of `OPTIMIZERS` ("none": inference); `master` ("float32": a float32 copy
    of what trains, and moments in float32; else moments have the dtype of the parameters, as torch and optax make
    them); `lora`, a rank (adapters beside all matrices of the layers, in float32 as PEFT keeps them, which alone
    train); `quantization`, as models take it; `remat` (each layer is computed again for its gradients); `cache_dtype`
    (that of the parameters, or int8).
    Key/value heads that are fewer than the devices of `tensor` are whole on each of them, as JAX holds them.
    Raises MeshError, ConfigError, InputError.
    """
    work = Workload.of(config, mesh, **options)
    return Plan(
        work,
        parameters=sum(held.times * work.nbytes(held) for held in work.tensors),
        gradients=sum(held.size * count for held, count in _training(work)),
        optimizer=sum(_optimizer_bytes(work, held) * count for held, count in _training(work)),
        cache=0 if work.trains else cache_bytes(work),
        activations=training_activations(work) if work.trains else inference_activations(work),
        copies=copied_bytes(work),
        collectives=collectives(work),
    )


def _training(work: Workload) -> list[tuple[Held, int]]:
    """What trains, and how many numbers of all its tensors a device holds."""
    return [(held, held.times * math.prod(work.shape(held))) for held in work.tensors if held.trains]


def _optimizer_bytes(work: Workload, held: Held) -> int:
    """Bytes for each number that trains: moments in its dtype, or master weights and moments in float32.

    AdamW on 16 bits with master weights is the 12 of ZeRO (arXiv 1910.02054, section 3.1); float32 is its own master.
    """
    has_master = work.master is not None and held.size < FLOAT
    size = FLOAT if has_master else held.size
    return size * (OPTIMIZERS[work.optimizer] + has_master)


def cache_bytes(work: Workload) -> int:
    """Bytes of a KV cache for `sequence` tokens a row: as many slots as `cache_layout.layer_slots` gives each layer.

    Keys and values [B, R, K, H], in int8 with a float32 scale for each token and head, and an int32 length a row.
    """
    config, sharding = work.config, work.sharding
    _, _, axes, _ = sharding.activation("BRKH")
    heads = config.num_key_value_heads // work.devices(axes)
    vector = config.head_dim * np.dtype(_numpy_name(work.cache_dtype)).itemsize
    vector += FLOAT if work.cache_dtype == "int8" else 0
    slots = sum(layer_slots(config, work.sequence))
    return work.rows * (2 * slots * heads * vector + np.dtype(np.int32).itemsize)


def _numpy_name(dtype: str) -> str:
    """A dtype of the same size that NumPy has."""
    return "float16" if dtype == "bfloat16" else dtype


# Estimates


@dataclass(frozen=True)
class _Widths:
    """Numbers of one token on a device."""

    hidden: int
    attention: int
    """Queries, keys, values, and what attention gives."""
    heads: int
    intermediate: int
    logits: int

    @classmethod
    def of(cls, work: Workload) -> _Widths:
        config = work.config
        _, _, axes, _ = work.sharding.activation("BTKH")
        queries = config.num_attention_heads // work.devices(work.axes("N"))
        keys = config.num_key_value_heads // work.devices(axes)
        return cls(
            config.hidden_size,
            2 * (queries + keys) * config.head_dim,
            queries,
            config.intermediate_size // work.devices(work.axes("F")),
            config.vocab_size // work.devices(work.axes("V")) if work.has_logits else 0,
        )


def training_activations(work: Workload) -> int:
    """Bytes that forward keeps for backward: an estimate, as Korthikanti et al. count (arXiv 2205.05198, section 4).

    Of a layer and token: its input, the input of the MLP and both normed, 4 D, and once more in float32 in the norms;
    q, k, v and attention's output, 2 (N + K) H; gate, silu(gate), up and their product, 4 F; a float32 sum a query
    head, for attention never keeps its probabilities. With `remat` the inputs of all layers and one layer whole. Then
    the last hidden states, and float32 logits, their log softmax and its gradient. Of a layer, eager PyTorch keeps this
    within 5 %; XLA decides by itself what it keeps and what it computes again.
    """
    width, size, tokens = _Widths.of(work), DTYPES[work.dtype], work.rows * work.sequence
    norm = 2 * size * width.hidden + FLOAT * width.hidden
    low_rank = 7 * (work.lora or 0) * FLOAT
    layer = 2 * norm + size * (width.attention + 4 * width.intermediate) + FLOAT * width.heads + low_rank
    layers = work.config.num_hidden_layers
    kept = layers * size * width.hidden + layer if work.remat else layers * layer
    return tokens * (kept + norm + 3 * FLOAT * width.logits)


def inference_activations(work: Workload) -> int:
    """Bytes that a layer computes with while the prompt is read: an estimate.

    As if the prompt were all of `sequence`: the hidden states and their norm, the larger of attention's 2 (N + K) H and
    the MLP's 3 F with what they give, and float32 logits of the last token.
    """
    width, size = _Widths.of(work), DTYPES[work.dtype]
    layer = 3 * width.hidden + max(width.attention, 3 * width.intermediate)
    return work.rows * (work.sequence * size * layer + FLOAT * width.logits)


def copied_bytes(work: Workload) -> int:
    """Bytes of weights that are made whole while they are needed: an estimate.

    Under fsdp a layer, and the largest of what is fetched meanwhile (a layer, the embedding, the head); in training of
    all parameters the largest gradient of these before it is shared out (ZeRO stage 3, arXiv 1910.02054, section 5.3).
    Of packed matrices the largest one as floats.
    """
    floats = [math.prod(work.shape(held, gathered=True)) * DTYPES[work.dtype] for held in work.tensors if held.packed]
    copies = max(floats, default=0)
    if work.axes("D"):
        layer = sum(work.nbytes(held, gathered=True) for held in work.tensors if held.is_of_layer)
        others = [work.nbytes(held, gathered=True) for held in work.tensors if not held.is_of_layer]
        largest = max(layer, *others)
        copies += layer + largest * (2 if work.trains and work.lora is None else 1)
    return copies
