"""What functions were traced of: tf.function keeps a config's numbers and a model's variables as they were then."""

from __future__ import annotations

import copy
import weakref
from typing import Any

_traced: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, list[Any]]]] = weakref.WeakKeyDictionary()


def changed(model: Any, function: str) -> bool:
    """Whether a model has another config, or other variables, than when this was last asked for a function's sake."""
    now = copy.copy(model.config), [*model.weights]
    config, variables = _traced.setdefault(model, {}).get(function, now)
    _traced[model][function] = now
    return config != now[0] or [*map(id, variables)] != [*map(id, now[1])]
