"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_core import MistralConfig


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[label] over labels other than `ignore`, and count; logits [..., V], labels [...]."""
    counted = labels != ignore
    log_probability = F.log_softmax(logits.float(), dim=-1)
    picked = log_probability.gather(-1, torch.where(counted, labels, 0)[..., None])[..., 0]
    return -torch.where(counted, picked, 0).sum(), counted.sum()


def classification_loss(config: MistralConfig, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
    kind = config.problem(float_labels=labels.is_floating_point())
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    labels = labels.float()
    if kind == "regression":
        losses = (logits.reshape(labels.shape) - labels).square()
    else:
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return losses.sum(), torch.ones_like(losses).sum()


def span_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums [2] and counts [2] of the cross entropies of start and end; a position beyond the text is not counted."""
    length = start_logits.shape[1]
    start, count = cross_entropy(start_logits, start_positions.reshape(-1).clamp(0, length), ignore=length)
    end, end_count = cross_entropy(end_logits, end_positions.reshape(-1).clamp(0, length), ignore=length)
    return torch.stack([start, end]), torch.stack([count, end_count])


def divided(total: Tensor, count: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return (total / torch.where(count > 0, count, 1)).mean()
