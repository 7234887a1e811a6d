"""One compiled layer for all: the layers of a finished model stacked and run by `jax.lax.scan`.

The program and the time to compile it no longer grow with the depth; on a CPU that pays from about 16 layers on, and
gradients take more memory (benchmarks/results/amd/flax_scan.md). What runs is the same: calls, outputs, caches,
dropout, gradients and checkpoints. A cached step copies the cache, whose layers are arrays of their own: unscan to
decode much.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mistral_core.errors import UnsupportedFeatureError

from .cache import KVCache
from .layers import DecoderLayer
from .model import OfLayers, one_by_one
from .step import Step
from .weights import PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def scan_layers(model: Model) -> Model:
    """Stack a model's layers, in place, and return it: [L, ...] arrays such as "model.layers.mlp.up_proj.weight".

    Takes one kind of parameter at a time, so memory holds the model and one of them. Raises UnsupportedFeatureError
    for layers of different windows, or packed or adapted in different ways.
    """
    body = model.base_model
    if body.run_layers is scanned:
        return model
    if len(set(body.config.layer_windows)) > 1:
        raise UnsupportedFeatureError(
            f"scan_layers: the layers' windows are {list(body.config.layer_windows)}, and one compiled layer has one "
            "window; leave this model as it is."
        )
    graph, states = _taken_apart([body.layers[str(index)] for index in range(len(body.layers))])
    body.layers = None  # the last reference to what is stacked
    stacked = [(path, _stacked([state.pop(path) for state in states])) for path in list(states[0])]
    body.layers, body.run_layers = _layer(graph, stacked), scanned
    return model


def unscan_layers(model: Model) -> Model:
    """Give each layer its own arrays again, in place, and return the model."""
    body = model.base_model
    if body.run_layers is one_by_one:
        return model
    graph, (state,) = _taken_apart([body.layers])
    body.layers = None
    layers: list[list[Any]] = [[] for _ in range(body.config.num_hidden_layers)]
    for path in list(state):
        leaf = state.pop(path)
        for layer, array in zip(layers, leaf.get_value(), strict=True):
            layer.append((path, leaf.replace(array)))
    body.layers = nnx.Dict({str(index): _layer(graph, layer) for index, layer in enumerate(layers)})
    body.run_layers = one_by_one
    return model


def scanned(
    layers: DecoderLayer,
    x_BTD: Array,
    steps: list[Step],
    past: KVCache | None,
    *,
    rngs: Any,
    checkpointing: Iterable[tuple[str, Any]] | None,
    output_hidden_states: bool,
) -> OfLayers:
    """What `one_by_one` returns, of a layer whose parameters are stacked; inner hidden states only where asked for."""
    graph, parameters = nnx.split(layers)

    def body(x_BTD: Array, of_layer: tuple[Any, Any, Any]) -> tuple[Array, tuple[Any, ...]]:
        state, keys_values, key = of_layer
        of_past = None if past is None else (*keys_values, past.length)
        x_BTD, weights, kept = nnx.merge(graph, state)(x_BTD, steps[0], of_past, rngs=key)
        return x_BTD, (x_BTD if output_hidden_states else None, weights, kept)

    if checkpointing is not None:
        # the loop itself keeps the computations apart
        body = jax.checkpoint(body, **{"prevent_cse": False, **dict(checkpointing)})
    keys_values = None
    if past is not None:
        of_layers = (past.layer(index)[:-1] for index in range(len(past.keys)))
        keys_values = tuple(map(jnp.stack, zip(*of_layers, strict=True)))
    keys = None if rngs[0] is None else rngs
    last_BTD, (states, weights, kept) = jax.lax.scan(body, x_BTD, (parameters, keys_values, keys))
    hidden_states = [last_BTD] if states is None else [x_BTD, *states]
    attentions = [] if weights is None else list(weights)
    return hidden_states, attentions, [] if kept is None else list(zip(*kept, strict=True))


def _taken_apart(layers: list[DecoderLayer]) -> tuple[Any, list[dict[Any, Any]]]:
    """What the layers have in common, and path -> variable of each; raises UnsupportedFeatureError."""
    graphs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
    kinds = [[leaf.dtype for leaf in jax.tree.leaves(state)] for state in states]
    if any(graph != graphs[0] for graph in graphs) or any(kind != kinds[0] for kind in kinds):
        raise UnsupportedFeatureError(
            "scan_layers: the layers' matrices are packed, or adapted, in different ways, and one compiled layer has "
            "one; dequantize(model) first, or leave this model as it is."
        )
    return graphs[0], [dict(nnx.to_flat_state(state)) for state in states]


def _stacked(leaves: list[Any]) -> Any:
    return leaves[0].replace(jnp.stack([leaf.get_value() for leaf in leaves]))


def _layer(graph: Any, leaves: list[tuple[Any, Any]]) -> DecoderLayer:
    return nnx.merge(graph, nnx.from_flat_state(leaves))
