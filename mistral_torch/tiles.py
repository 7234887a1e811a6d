"""A long text through what is computed token by token, by tiles of tokens: what is made on the way stays small.

The C library maps arrays of more than 32 MB anew each time, and the system fills their pages with zeros first. Tiles
use the same memory again, which mostly is in the processor's cache, and what they make is gone after each.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native

MAPPED = 32 << 20
"""Bytes of an array from which on its memory is fresh."""
CACHED = 4 << 20
"""What a tile takes of an array that is one of a few."""
LEAST = 512
"""The fewest tokens of a tile for products, for which a token costs what it does for more."""


Again = Literal["whole", "in part"]
_again: contextvars.ContextVar[Again | None] = contextvars.ContextVar("again", default=None)


def again() -> Again | None:
    """How what is computed now is computed once more for gradients; None: it is not.

    Whole: first without gradients and then with them, which is to give the same bits. In part: both times with them,
    and the second time up to the last of what is kept.
    """
    return _again.get()


def computed_again(function: Callable[..., Any], how: Again) -> Callable[..., Any]:
    """A function within which `again` says how it is computed again, in whatever thread that is."""

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        token = _again.set(how)
        try:
            return function(*arguments, **options)
        finally:
            _again.reset(token)

    return called


def in_tiles(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The forward of an MLP of torch's own products, tile by tile on a CPU where nothing in it is kept for gradients.

    These are off, or a checkpointed layer is computed, whose second time then ends before its MLP.
    """

    @functools.wraps(forward)
    def computed(mlp: Any, x_BTD: Tensor) -> Tensor:
        size = _tokens_of_tile(mlp, x_BTD)
        if size is None:
            return forward(mlp, x_BTD)
        parts = dict(mlp.named_children())

        def formula(x: Tensor, *weights: Tensor) -> Tensor:
            products = (functools.partial(F.linear, weight=weight) for weight in weights)
            return forward(SimpleNamespace(**dict(zip(parts, products, strict=True))), x)

        return _by_tiles(formula, size, x_BTD, *(part.weight for part in parts.values()))

    return computed


def _tokens_of_tile(mlp: Any, x_BTD: Tensor) -> int | None:
    """How many tokens a tile has; None: all go at once, as they are few, or it is seen how often parts are called."""
    if not native.unwatched(x_BTD) or torch.is_autocast_enabled("cpu"):
        return None
    if again() == "whole" or (torch.is_grad_enabled() and again() is None):  # which keeps what is between products
        return None
    tokens = x_BTD.shape[:-1].numel()
    if x_BTD.dim() != 3 or tokens <= LEAST or not all(map(_is_product, mlp.children())):
        return None
    between = 3 * mlp.up_proj.out_features * x_BTD.element_size()
    size = max(LEAST, MAPPED // between)
    return size if tokens > size and native.unwatched(*mlp.parameters()) else None


def _is_product(part: nn.Module) -> bool:
    """Whether a module is a product with a matrix, and nothing else is done at its calls."""
    return type(part) is nn.Linear and part.bias is None and native.is_plain(part) and not part._backward_hooks


def learnt_in_tiles(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula of x [B, T, ...], tile by tile on a CPU where gradients go through it: its arguments alone are kept.

    Of its other arguments, arrays [B, T, ...] belong to the same tokens, and the rest to all.
    """

    @functools.wraps(formula)
    def computed(x_BT: Tensor, *others: Any) -> Tensor:
        arrays = [x_BT, *(each for each in others if isinstance(each, Tensor))]
        if not native.learnt(*arrays) or not native.unwatched(*arrays) or x_BT.dim() < 3 or x_BT.nbytes < MAPPED:
            return formula(x_BT, *others)
        return _by_tiles(formula, CACHED * x_BT.shape[:2].numel() // x_BT.nbytes, x_BT, *others)

    return computed


def _by_tiles(formula: Callable[..., Tensor], tokens: int, x_BT: Tensor, *others: Any) -> Tensor:
    """The formula, so many tokens at a time."""
    size = max(1, tokens // x_BT.shape[0])
    given = [x_BT, *others]
    if not native.learnt(*(each for each in given if isinstance(each, Tensor))):
        return _computed(formula, size, given)
    of_others: list[Any] = []
    return _Tiles.apply(_Keep.apply(of_others, *given), formula, size, given, of_others)


class _Keep(torch.autograd.Function):
    """What the gradients of tiles are computed from, kept before the tiles are: where a checkpointed layer ends with
    tiles, computing it again ends here."""

    @staticmethod
    def forward(ctx: Any, of_others: list[Any], *given: Any) -> Tensor:
        ctx.of_others, ctx.constants = of_others, [None if isinstance(each, Tensor) else each for each in given]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in given))
        return given[0].view_as(given[0])

    @staticmethod
    def backward(ctx: Any, of_x: Tensor) -> tuple[Any, ...]:
        return None, of_x, *ctx.of_others


class _Tiles(torch.autograd.Function):
    """A formula tile by tile; for gradients it is computed again."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, formula: Callable[..., Tensor], size: int, given: list[Any], of_others: list[Any]
    ) -> Tensor:
        ctx.formula, ctx.size, ctx.of_others = formula, size, of_others
        return _computed(formula, size, given)

    @staticmethod
    def backward(ctx: Any, upstream_BT: Tensor) -> tuple[Any, ...]:
        kept = ctx.next_functions[0][0]
        pairs = zip(kept.saved_tensors, kept.constants, strict=True)
        given = [constant if tensor is None else tensor for tensor, constant in pairs]
        wanted = [number for number, needed in enumerate(kept.needs_input_grad[1:]) if needed]
        if torch.is_grad_enabled():  # somebody differentiates once more
            inputs = [given[number] for number in wanted]
            gradients = torch.autograd.grad(ctx.formula(*given), inputs, upstream_BT, create_graph=True)
        else:
            gradients = _gradients(ctx.formula, ctx.size, given, wanted, upstream_BT)
        of = dict(zip(wanted, gradients, strict=True))
        ctx.of_others[:] = [of.get(number) for number in range(1, len(given))]
        return of[0] if 0 in of else torch.zeros_like(given[0]), None, None, None, None


def _computed(formula: Callable[..., Tensor], size: int, given: list[Any]) -> Tensor:
    """The formula of given arrays and others, tile after tile."""
    y_BT = torch.empty_like(given[0], memory_format=torch.contiguous_format)
    for columns in _tiles(y_BT, size):
        y_BT[:, columns] = formula(*(_tile(each, y_BT, columns) for each in given))
    return y_BT


def _gradients(
    formula: Callable[..., Tensor], size: int, given: list[Any], wanted: list[int], upstream_BT: Tensor
) -> list[Tensor]:
    """The gradients of these arguments, tile by tile."""
    found = []
    for number in wanted:
        make = torch.empty_like if _is_of_tokens(given[number], upstream_BT) else torch.zeros_like
        found.append(make(given[number], memory_format=torch.contiguous_format))
    for columns in _tiles(upstream_BT, size):
        tile = [_tile(each, upstream_BT, columns) for each in given]
        leaves = [tile[number].detach().requires_grad_() for number in wanted]
        for number, leaf in zip(wanted, leaves, strict=True):
            tile[number] = leaf
        with torch.enable_grad():
            y = formula(*tile)
        for gradient, of_tile in zip(found, torch.autograd.grad(y, leaves, upstream_BT[:, columns]), strict=True):
            if _is_of_tokens(gradient, upstream_BT):
                gradient[:, columns] = of_tile
            else:
                gradient += of_tile
    return found


def _tiles(x_BT: Tensor, size: int) -> list[slice]:
    """The columns of each tile."""
    return [slice(begin, begin + size) for begin in range(0, x_BT.shape[1], size)]


def _is_of_tokens(each: Any, x_BT: Tensor) -> bool:
    """Whether something is an array [B, T, ...] as x is."""
    return isinstance(each, Tensor) and each.dim() > 2 and each.shape[:2] == x_BT.shape[:2]


def _tile(each: Any, x_BT: Tensor, columns: slice) -> Any:
    """These columns of what is of the tokens of x; all of what is not."""
    return each[:, columns] if _is_of_tokens(each, x_BT) else each
