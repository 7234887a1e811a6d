"""What functions were traced of: tf.function keeps a config's numbers and a model's parts as they were then."""

from __future__ import annotations

import weakref
from typing import Any

_traced: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, list[Any]]]] = weakref.WeakKeyDictionary()


def changed(model: Any, function: str) -> bool:
    """Whether a model has other layers or variables than when last asked for a function's sake, or another config.

    Of the config only what a program depends on counts; of layers, how packed ones round what they multiply.
    """
    layers = [*model._flatten_layers(include_self=False)]
    settings = model.config.program(model.architecture), [getattr(layer, "activations", None) for layer in layers]
    now = settings, [*model.weights, *layers]
    before, parts = _traced.setdefault(model, {}).get(function, now)
    _traced[model][function] = now
    return before != settings or [*map(id, parts)] != [*map(id, now[1])]
