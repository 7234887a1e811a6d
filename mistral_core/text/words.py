"""Encoding by parts: where no token reaches over a place in a text, what stands on both sides is encoded for itself.

Such places are frequent: of the pairs of characters that may stand beside each other, few are within a token. The parts
come again and again, and each is encoded once.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np

MOST, LONGEST = 1 << 17, 64
"""Parts that are kept, and characters of one: about 25 MB."""


class Words:
    """Ids of texts by a BPE with these tokens, whose parts are encoded when they first come."""

    def __init__(self, tokens: Iterable[str], encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode, self._known = encode, dict[str, list[int]]()
        pairs = {pair for token in tokens for pair in pairwise(token)}
        letters = sorted({letter for pair in pairs for letter in pair})
        kind = {letter: number for number, letter in enumerate(letters, start=1)}
        self._kinds = np.zeros(0x110000, np.uint16)  # 0: a character that is in no token with others
        self._kinds[[ord(letter) for letter in letters]] = list(kind.values())
        self._apart = np.ones((len(kind) + 1, len(kind) + 1), bool)
        for left, right in pairs:
            self._apart[kind[left], kind[right]] = False

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        known = self._known
        rows = [self._parts(text) for text in texts]
        new = [part for part in set(chain.from_iterable(rows)) if part not in known]
        found = dict(zip(new, self._encode(new), strict=True)) if new else {}
        rare = {part: found.pop(part) for part in new if len(part) > LONGEST}
        known.update(found)
        if len(known) > MOST:
            self._known = {}  # not cleared: another thread may be reading it
        ids: Mapping[str, list[int]] = ChainMap(known, rare) if rare else known
        return [list(chain.from_iterable([ids[part] for part in row])) for row in rows]

    def _parts(self, text: str) -> list[str]:
        """A text cut at every place that no token reaches over."""
        kinds = self._kinds[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        cuts = np.flatnonzero(self._apart[kinds[:-1], kinds[1:]]) + 1
        return [text[first:last] for first, last in pairwise([0, *cuts.tolist(), len(text)])] if text else []
