"""What the layers of one call are told: a value that the model makes, and that layers of one window share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .attention import Visibility, prepared
from .cache import KVCache, Place, place


class Sight(NamedTuple):
    """What layers of one window see in a call."""

    place: Place | None
    """Where new tokens go in the past; None: there is no past."""
    visibility: Visibility
    """Who sees whom."""


class Step(NamedTuple):
    """What the layers of one call share."""

    cos_sin: tuple[Tensor, Tensor]
    """cos and sin [B, T, H/2] of the new tokens."""
    order_BT: Tensor
    """[B, T]: the number of real tokens before each new one in its row, -1 for padding."""
    capacity: int | None = None
    """The most real tokens the cache may hold in a row; None: no cache, or one that grows."""
    query_scale_BT: Tensor | None = None
    """[B, T]: what the rotated queries are multiplied by; None: by nothing."""
    document_ids_BT: Tensor | None = None
    """[B, T]: the packed document of each token."""
    output_attentions: bool = False
    """Whether layers return their attention weights."""
    in_c: bool = False
    """Whether attention may be computed in C."""
    sight: Sight | None = None
    """What the layer that is called sees; None: it looks by itself."""


def look(step: Step, window: int | None, past: tuple[Tensor, ...] | None) -> Sight:
    """What a layer of this window, and of such a past, sees in a call."""
    if past is None:
        return Sight(None, Visibility(step.order_BT, step.order_BT, window, step.document_ids_BT, in_c=step.in_c))
    where = place(step.order_BT, past[-1], past[0].shape[1], window=window, capacity=step.capacity)
    return Sight(where, Visibility(step.order_BT, where.order_BS, window, step.document_ids_BT, in_c=step.in_c))


def steps_of_layers(step: Step, windows: Sequence[int | None], past: KVCache | None, implementation: str) -> list[Step]:
    """The step of each layer, with what it sees: layers of one window, and of rings of one size, share theirs.

    What attention is computed from, the mask or the blocks of a long text, is made here, once for those layers.
    """
    slots = [0 if past is None else past.keys[index].shape[1] for index in range(len(windows))]
    kinds = list(zip(windows, slots, strict=True))
    implementation = "eager" if step.output_attentions else implementation
    steps: list[Step] = []
    for index, kind in enumerate(kinds):
        alike = next(number for number, other in enumerate(kinds) if other == kind)
        if alike < index:
            steps.append(steps[alike])
            continue
        sight = look(step, kind[0], None if past is None else past.layer(index))
        sight = sight._replace(visibility=prepared(sight.visibility, implementation))
        steps.append(step._replace(sight=sight))
    return steps
