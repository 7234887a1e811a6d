"""Losses, each a float32 sum and how many numbers are in it; `divided` makes one loss of them.

Sums and counts of parts of a step (replicas, devices, accumulated batches) add up, so that a step is the same however
its rows were split; a mean of means is not. Formulas: `mistral_core.reference.ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mistral_core import MistralConfig

from .arrays import without_autocast
from .products import PackedWeight, as_floats, product


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(logits)[label] over labels other than `ignore`, and count; logits [..., V], labels [...]."""
    return -_log_probabilities(logits, labels, ignore).sum(), (labels != ignore).sum()


def _log_probabilities(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """log softmax(logits)[label] of each label, 0 of those that are ignored."""
    counted = labels != ignore
    log_probability = F.log_softmax(logits.float(), dim=-1)
    picked = log_probability.gather(-1, torch.where(counted, labels, 0)[..., None])[..., 0]
    return torch.where(counted, picked, 0)


def chunked_cross_entropy(
    x: Tensor, weight: Tensor | PackedWeight, labels: Tensor, *, rows: int, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the logits x W^T, of so many rows at a time; x [B, T, D], W [V, D], labels [B, T].

    Gradients make the logits again, as gradient checkpointing does: what is kept is x, W as it is, and a number for
    each row. Sums are in float32 and rounded once, in every dtype; a packed W has no gradient.
    """
    x_RD, labels_R = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    plain, packed = (None, weight) if isinstance(weight, PackedWeight) else (weight, None)
    losses_R = _RowLosses.apply(x_RD, plain, packed, labels_R, rows, ignore)
    return losses_R.sum(), (labels_R != ignore).sum()


class _RowLosses(torch.autograd.Function):
    """The cross entropy of each row of x W^T, of which no more rows than asked for are there at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight: Tensor | None,
        packed: PackedWeight | None,
        labels_R: Tensor,
        rows: int,
        ignore: int,
    ) -> Tensor:
        w_VD = as_floats(packed if weight is None else weight)
        log_sum_R = torch.empty_like(labels_R, dtype=torch.float32)
        losses_R = torch.empty_like(log_sum_R)
        counted_R = labels_R != ignore
        label_R = torch.where(counted_R, labels_R, 0)
        for part in _parts(len(x_RD), rows):
            logits = product(x_RD[part], w_VD, dtype=torch.float32)
            log_sum_R[part] = logits.logsumexp(-1)
            losses_R[part] = log_sum_R[part] - logits.gather(-1, label_R[part, None])[:, 0]
        ctx.save_for_backward(x_RD, weight, label_R, counted_R, log_sum_R)
        ctx.packed, ctx.rows = packed, rows
        return torch.where(counted_R, losses_R, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_R: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, weight, label_R, counted_R, log_sum_R = ctx.saved_tensors
        w_VD = as_floats(ctx.packed if weight is None else weight)
        dx_RD = torch.empty_like(x_RD) if ctx.needs_input_grad[0] else None
        dw_VD = torch.zeros_like(w_VD) if ctx.needs_input_grad[1] else None
        upstream_R = torch.where(counted_R, upstream_R, 0)
        for part in _parts(len(x_RD), ctx.rows):
            logits = product(x_RD[part], w_VD, dtype=torch.float32)
            d_logits = logits.sub_(log_sum_R[part, None]).exp_()  # softmax, in the place of the logits
            d_logits.scatter_add_(-1, label_R[part, None], -torch.ones_like(d_logits[:, :1]))
            d_logits *= upstream_R[part, None]
            with without_autocast(x_RD):
                if dx_RD is not None:
                    dx_RD[part] = (d_logits @ w_VD).to(x_RD.dtype)
                if dw_VD is not None:
                    dw_VD.addmm_(d_logits.T, x_RD[part].float())
        return dx_RD, None if dw_VD is None else dw_VD.to(weight.dtype), None, None, None, None


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, count, rows))


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


def label_log_probability(logits: Tensor, labels: Tensor, *, ignore: int = -100) -> Tensor:
    """Sums [B] of log softmax(logits)[label] over labels [B, T] of each row, each predicted by the column before."""
    return _log_probabilities(logits[:, :-1], labels[:, 1:], ignore).sum(-1)


def preference_loss(
    policy_B: Tensor, reference_B: Tensor, counted_B: Tensor, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log sigmoid(beta * margin) over pairs, their number, and of how many the margin is above 0.

    Formula: `mistral_core.reference.ops.preference_loss`.
    """
    chosen, rejected = (policy_B - reference_B).chunk(2)
    margin, pairs = beta * (chosen - rejected), counted_B.chunk(2)[0]
    return torch.where(pairs, F.softplus(-margin), 0).sum(), pairs.sum(), (pairs & (margin > 0)).sum()


def divided(total: Tensor, count: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss: a sum over its count, or over that of the whole step; of two sums [2] the mean. Nothing counted is 0."""
    count = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return (total / torch.where(count > 0, count, 1)).mean()
