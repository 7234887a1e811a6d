"""Rows of one length, packed with examples of many lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens as indices of the lengths, each of which is in one of them, whole.

    The longest are put first, each into the row that it leaves the least room in (best fit decreasing): that makes
    at most 11/9 of the fewest rows, and four (Johnson 1974). In a row, and between rows by their first, indices rise.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # room and number of each row, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        need = lengths[index]
        at = bisect_left(left, (need, 0))
        space, row = left.pop(at) if at < len(left) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(left, (space - need, row))
    return sorted(map(sorted, rows))


def windows(sized: Iterable[tuple[T, int]], room: int) -> Iterator[list[T]]:
    """What is packed together: neighbours, until their sizes add up to `room` at least."""
    window: list[T] = []
    total = 0
    for each, size in sized:
        window.append(each)
        total += size
        if total >= room:
            yield window
            window, total = [], 0
    if window:
        yield window
