"""Losses, each a float32 mean; where there is nothing to predict the loss is 0.

Formulas: `mistral_core.reference.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_core import MistralConfig


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[label] over labels other than `ignore`; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = F.log_softmax(logits.float(), dim=-1)
    picked = log_probability.gather(-1, torch.where(counted, labels, 0)[..., None])[..., 0]
    return -torch.where(counted, picked, 0).sum() / counted.sum().clamp(min=1)


def classification_loss(config: MistralConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=labels.is_floating_point())
    if kind == "regression":
        return (logits.reshape(labels.shape) - labels.float()).square().mean()
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def span_loss(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the cross entropies of start and end; a position beyond the text is not counted."""
    length = start_logits.shape[1]
    start = cross_entropy(start_logits, start_positions.reshape(-1).clamp(0, length), ignore=length)
    end = cross_entropy(end_logits, end_positions.reshape(-1).clamp(0, length), ignore=length)
    return (start + end) / 2
