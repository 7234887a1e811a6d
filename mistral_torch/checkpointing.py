"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mistral_core.errors import UnsupportedFeatureError

from .tiles import Again, computed_again


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`.

    Raises UnsupportedFeatureError for reentrant checkpointing with a cache, whose gradients it would lose.
    """

    def run(x_BTD: Tensor, step: Any, past: Any) -> Any:
        if options.get("use_reentrant") and past is not None:
            raise UnsupportedFeatureError(
                "gradient checkpointing with use_reentrant=True loses the gradients of a cache; "
                "pass use_cache=False, or enable it with use_reentrant=False."
            )
        how: Again = "whole" if options.get("use_reentrant") else "in part"
        # a compiler that is tracing sees to that itself, and does not know of contexts
        told = layer if torch.compiler.is_compiling() else computed_again(layer, how)
        return checkpoint(told, x_BTD, step, past, **options)

    return run
