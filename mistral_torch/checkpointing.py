"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Tensor, *arrays: Any, **keywords: Any) -> Any:
        call = functools.partial(layer, **keywords)
        return checkpoint(call, x_BTD, *arrays, **{"use_reentrant": False, **options})

    return run
