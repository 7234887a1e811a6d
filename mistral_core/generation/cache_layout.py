"""How many slots each layer's KV cache has, and in which dtypes: the same for the reference and every backend."""

from __future__ import annotations

from typing import Any

from ..config import MistralConfig
from ..errors import ConfigError, InputError
from ..plain import dtype_name

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8")
"""What keys and values can be kept in; int8 are codes, with a scale for each token and key/value head."""


def cache_dtype(dtype: Any) -> str:
    """The name of a dtype, given by its name or as any framework's; raises ConfigError for one no cache can have."""
    name = str(dtype_name(dtype))
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return name


def layer_slots(
    config: MistralConfig, capacity: int | None, *, rolling: bool = True, lookback: int = 0
) -> tuple[int, ...]:
    """R of each layer of a new cache: capacity + 1, or W + 1 + lookback where it rolls; 1 where it is to grow."""
    if capacity is None:
        return (1,) * config.num_hidden_layers
    return tuple(
        capacity + 1 if window is None or not rolling else min(window + lookback, capacity) + 1
        for window in config.layer_windows
    )


def grown_slots(slots: int, new: int, window: int | None, capacity: int | None) -> int:
    """R after `new` more columns: unchanged with a capacity; without, as many as needed up to the window."""
    if capacity is not None:
        return slots
    return slots + new if window is None else max(slots, min(slots + new, window + 1))


def grown_layout(
    config: MistralConfig,
    slots: list[int],
    capacity: int | None,
    wanted: int,
    *,
    rolling: bool,
    lookback: int,
) -> tuple[int, ...]:
    """R of each layer of a cache with `slots` when it is to hold `wanted` tokens a row; a ring that rolls stays.

    A layer that cannot have rolled keeps its tokens in the slots of their order, and so in a larger ring too.
    """
    new = layer_slots(config, wanted, rolling=rolling, lookback=lookback)
    rolls = [
        window is not None and (old > window if capacity is None else old <= capacity)
        for window, old in zip(config.layer_windows, slots, strict=True)
    ]
    return tuple(old if rolled else max(old, size) for old, size, rolled in zip(slots, new, rolls, strict=True))


def overwrites_visible(slots: int, past_slots: int, new: int, window: int | None, capacity: int | None) -> bool:
    """Whether writing `new` columns into a ring of `slots` may destroy a key that one of them must still see.

    Then attention reads the past and the new tokens side by side, else it reads the ring after the write.
    """
    never_wraps = (capacity is not None and capacity < slots) or slots == past_slots + new
    return not never_wraps and window is not None and new > slots - window


def check_rollback(config: MistralConfig, slots: list[int], length: list[int], count: list[int]) -> None:
    """Raise InputError unless the last `count` tokens of each row can be forgotten and the window is still whole."""
    for row, (tokens, back) in enumerate(zip(length, count, strict=True)):
        if not 0 <= back <= tokens:
            raise InputError(f"rollback: {back} tokens of row {row}, which has {tokens}.")
        for window, ring in zip(config.layer_windows, slots, strict=True):
            if window is not None and tokens >= ring and back > ring - window - 1:
                raise InputError(
                    f"rollback: {back} tokens of row {row}, the rolling cache can go back {ring - window - 1}; "
                    "allocate it with a larger lookback."
                )


def cropped(slots: list[int], length: list[int], max_length: int) -> list[int]:
    """How many tokens of each row are to be forgotten, so that `max_length` are left, or so many fewer if negative.

    Raises InputError where a ring has overwritten a token, which a shorter row might have to see.
    """
    longest = max(length, default=0)
    most = max_length if max_length >= 0 else max(longest + max_length, 0)
    if most < longest and longest >= min(slots):
        raise InputError("crop: the cache has rolled on; rollback(count, config) knows how far it can go back.")
    return [max(tokens - most, 0) for tokens in length]
