"""Rows of token ids: framed by special tokens, cut to a length, padded."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from ..errors import TokenizerError

PADDINGS = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}
TRUNCATIONS = {
    None: None, False: None, "do_not_truncate": None, True: "longest_first", "longest_first": "longest_first",
    "only_first": "only_first", "only_second": "only_second",
}  # fmt: skip
FILLS: dict[str, Any] = {"attention_mask": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0), "assistant_masks": 0}
"""What stands beside a padding token, and but for the attention mask beside those around a text, by the output."""


class RowOptions(TypedDict, total=False):
    """The keyword arguments that texts and ids are prepared by, as transformers has them."""

    add_special_tokens: bool
    """Frame each text as the tokenizer's files say; True where it is not said."""
    padding: bool | str
    """False, True or "longest", "max_length"."""
    truncation: bool | str | None
    """False, True or "longest_first", "only_first", "only_second"; special tokens are kept."""
    max_length: int | None
    """Tokens; where it is None, the tokenizer's `model_max_length`."""
    stride: int
    """How many of the kept tokens stand among the overflowing ones."""
    pad_to_multiple_of: int | None
    padding_side: str | None
    """"left" or "right"; where it is None, the tokenizer's own."""
    return_tensors: str | None
    """"np", "pt", "jax" or "tf"; lists where it is None."""
    return_attention_mask: bool | None
    return_overflowing_tokens: bool
    """Adds `overflowing_tokens`, what was cut, and `num_truncated_tokens`."""
    return_special_tokens_mask: bool
    return_length: bool
    verbose: bool
    """Whether to warn of arguments that do nothing."""


class Limits(NamedTuple):
    """How long rows may be and are made: Options, checked."""

    padding: str | None
    truncation: str | None
    max_length: int | None
    stride: int
    multiple: int
    side: str


class Frame(NamedTuple):
    """The special tokens around one sequence, and between two."""

    before: list[int]
    after: list[int]
    between: list[int]
    """Behind the first and before the second of two."""


NO_FRAME = Frame([], [], [])

Columns = dict[str, list[Any]]
"""Lists of one length: `input_ids`, and `offset_mapping` and `special_tokens_mask` where they are asked for."""


def framed(first: Columns, second: Columns | None, frame: Frame, limits: Limits, side: str) -> dict[str, Any]:
    """One or two sequences with special tokens around them, together at most `max_length` if they are to be cut.

    The row's columns, `overflowing_tokens` and `num_truncated_tokens`.
    Raises TokenizerError where there is no room.
    """
    sequences = [first] if second is None else [first, second]
    lengths = [len(each["input_ids"]) for each in sequences]
    inside = [frame.before, *([] if second is None else [frame.between]), frame.after]
    total = sum(lengths) + sum(map(len, inside))
    remove = 0
    if limits.truncation is not None and limits.max_length is not None:
        remove = max(total - limits.max_length, 0)
    taken = _taken(lengths, remove, limits.truncation or "longest_first")
    row: dict[str, Any] = {"overflowing_tokens": [], "num_truncated_tokens": remove}
    for name in first:
        parts = [cut(each[name], number, side, limits.stride) for each, number in zip(sequences, taken, strict=True)]
        borders = inside if name == "input_ids" else [[FILLS[name]] * len(border) for border in inside]
        row[name] = _alternating(borders, [kept for kept, _ in parts])
        if name == "input_ids":
            row["overflowing_tokens"] = [each for _, over in parts for each in over]
    return row


def _alternating(borders: list[list[Any]], parts: list[list[Any]]) -> list[Any]:
    """border, part, border, ..., border as one list."""
    if len(parts) == 1 and not any(borders):
        return parts[0]  # most rows of a corpus
    row = list(borders[0])
    for part, border in zip(parts, borders[1:], strict=True):
        row += part
        row += border
    return row


def cut(row: list[Any], remove: int, side: str, stride: int = 0) -> tuple[list[Any], list[Any]]:
    """A row without `remove` entries of a side, and those with the `stride` entries next to them."""
    if remove <= 0:
        return row, []
    over = min(len(row), remove + stride)
    if side == "left":
        return row[remove:], row[:over]
    return row[: max(len(row) - remove, 0)], row[len(row) - over :]


def _taken(lengths: list[int], remove: int, strategy: str) -> list[int]:
    """How many entries are taken from each of one or two sequences."""
    first, *others = lengths
    second = sum(others)
    if strategy == "only_first" or not others:
        taken = [remove, 0]
    elif strategy == "only_second":
        taken = [0, remove]
    else:  # from the longer one, one by one, the second of two equal ones
        left = max(first + second - remove, 0)
        kept = min(first, max(left - second, (left + 1) // 2))
        taken = [first - kept, second - (left - kept)]
    if taken[0] > first or taken[1] > second:
        raise TokenizerError(
            f"truncation {strategy}: {remove} tokens are to be removed from {' and '.join(map(str, lengths))}; "
            "raise max_length or choose another strategy."
        )
    return taken[: len(lengths)]


def pad(columns: Columns, ids: str, limits: Limits, padding_id: int) -> Columns:
    """Rows of a batch, by name, made of one length at least; columns that are no rows of tokens stay as they are."""
    if limits.padding is None:
        return columns
    length = max(map(len, columns[ids]), default=0)
    if limits.padding == "max_length" and limits.max_length is not None:
        length = limits.max_length  # rows that are longer stay so
    length = -(-length // limits.multiple) * limits.multiple
    fills = {**FILLS, ids: padding_id}
    return {
        name: [_filled(row, length, fills[name], limits.side) for row in rows] if name in fills else rows
        for name, rows in columns.items()
    }


def _filled(row: list[Any], length: int, fill: Any, side: str) -> list[Any]:
    more = [fill] * (length - len(row))
    return more + list(row) if side == "left" else list(row) + more
