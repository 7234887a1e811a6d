"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mistral_core.errors import UnsupportedFeatureError

from .between import as_formulas


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
        # which computes it without gradients first
        again = as_formulas(layer) if options.get("use_reentrant") else layer
        return checkpoint(again, x_BTD, step, past, **options)

    return run
