"""Gradient checkpointing: a layer keeps its input instead of its activations and is computed again for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from tensorflow import Tensor


def checkpointed(layer: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The layer, called as before; `options` are those of `gradient_checkpointing_enable`."""

    def run(x_BTD: Tensor, step: Any, past: Any, **seeds: Any) -> Any:
        if past is not None or step.output_attentions:
            return layer(x_BTD, step=step, past=past, **seeds)  # recompute_grad gives back tensors of gradients alone
        call = tf.recompute_grad(lambda x_BTD: layer(x_BTD, step=step, past=past, **seeds)[0], **options)
        return call(x_BTD), None, None

    return run
