"""What a checkpoint computes on a fixed prompt, by the float64 reference, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..reference import heads, model, ops
from . import lazy
from .contents import Contents

TOKENS = 12
KEPT_TENSORS = 8


def prompt(config: MistralConfig) -> np.ndarray:
    """[1, T] token ids that depend on the size of the vocabulary only."""
    length = min(TOKENS, config.max_position_embeddings)
    return np.random.Generator(np.random.PCG64(0)).integers(0, config.vocab_size, (1, length))


def of(checkpoint: Contents, architecture: str) -> dict[str, Any]:
    """The prompt, and the largest outputs of its last position with their indices.

    The outputs are logits [V] of a language model, or the last hidden state [D] of any other class.
    """
    config = checkpoint.config
    ids = prompt(config)
    outputs = last_outputs(config, lazy.arrays(checkpoint, np.float64), architecture, ids)
    order = np.argsort(-np.abs(outputs), kind="stable")[:KEPT_TENSORS]
    return {
        "input_ids": ids[0].tolist(),
        "indices": order.tolist(),
        "values": [float(value) for value in outputs[order]],
        "sum": float(outputs.sum()),
    }


def last_outputs(
    config: MistralConfig, parameters: Mapping[str, np.ndarray], architecture: str, ids: np.ndarray
) -> np.ndarray:
    """[V] logits, or [D] hidden state where the class has none, of the last position; a layer at a time in float64."""
    *_, hidden = layer_states(config, parameters, ids)
    if architecture != "MistralForCausalLM":
        return hidden[0, -1]
    return ops.linear(hidden[:, -1:], heads.head_weight(config, parameters))[0, 0]


def layer_states(config: MistralConfig, parameters: Mapping[str, np.ndarray], ids: np.ndarray) -> Iterator[np.ndarray]:
    """Yield [B, T, D] of the embeddings, of each layer and of the last norm, letting go of each layer's parameters."""
    x_BTD = parameters["model.embed_tokens.weight"][ids]
    order_BT = ops.token_order(np.ones_like(ids), np.zeros(len(ids), int))
    step = model.Step(ops.rotary(order_BT, config), order_BT, ops.query_scale(order_BT, config))
    yield x_BTD
    for layer in range(config.num_hidden_layers):
        x_BTD, _, _ = model.decoder_layer(config, parameters, layer, x_BTD, step)
        yield x_BTD
    yield ops.rms_norm(x_BTD, parameters["model.norm.weight"], config.rms_norm_eps)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """The largest difference between two fingerprints' numbers; infinite where they name other outputs."""
    if first["indices"] != second["indices"]:
        return float("inf")
    pairs = zip([*first["values"], first["sum"]], [*second["values"], second["sum"]], strict=True)
    return max(abs(a - b) for a, b in pairs)
