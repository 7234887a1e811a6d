"""Encoding by words, and new words by parts: where no token reaches over a place, both sides are encoded alone.

A word begins with its spaces. Within words such places are frequent too: of the pairs of characters that may stand
beside each other, few are within a token. Words and parts come again and again, and each is encoded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

import numpy as np

from .sentencepiece import SPACE

WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
MOST = 1 << 21
"""Characters of words, and of parts, that are kept: some 30 MB of words of usual lengths."""

Encode = Callable[[list[str]], list[list[int]]]


def can_be_split(tokens: Iterable[str]) -> bool:
    """Whether no token goes on into a next word, so that the ids of a text are those of its words."""
    return re.search(f"[^{SPACE}\n]{SPACE}", "\n".join(tokens)) is None


class Known:
    """Ids by text, those that came first thrown away together when there are too many."""

    def __init__(self) -> None:
        self._ids: dict[str, list[int]] = {}
        self._size = 0

    def with_new(self, wanted: set[str], encode: Encode) -> dict[str, list[int]]:
        """A dict that has the wanted texts, those that are new encoded."""
        ids = self._ids
        new = [text for text in wanted if text not in ids]
        if new:
            ids.update(zip(new, encode(new), strict=True))
            self._size += sum(map(len, new))
        if self._size > MOST:
            self._ids, self._size = {}, 0  # not cleared: another thread may be reading it
        return ids


class Words:
    """Ids of texts by a BPE with these tokens: those of their words, which are encoded when they first come."""

    def __init__(self, tokens: Sequence[str], encode: Encode) -> None:
        self._known, self._parts = Known(), Parts(tokens, encode)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, whose spaces are written as U+2581."""
        rows = [WORD.findall(text) for text in texts]
        ids = self._known.with_new(set(chain.from_iterable(rows)), self._parts.encode).__getitem__
        return [list(chain.from_iterable(map(ids, row))) for row in rows]


class Parts:
    """Ids of words, from those of their parts."""

    def __init__(self, tokens: Iterable[str], encode: Encode) -> None:
        self._encode, self._known = encode, Known()
        pairs = {pair for token in tokens for pair in pairwise(token)}
        kind = {letter: number for number, letter in enumerate(sorted({each for pair in pairs for each in pair}), 1)}
        self._kinds = np.zeros(0x110000, np.uint16)  # 0: a character that is in no token with others
        self._kinds[[ord(letter) for letter in kind]] = list(kind.values())
        self._apart = np.ones((len(kind) + 1, len(kind) + 1), bool)
        for left, right in pairs:
            self._apart[kind[left], kind[right]] = False

    def encode(self, words: list[str]) -> list[list[int]]:
        """The ids of each word."""
        if not words:
            return []
        text = "".join(words)
        kinds = self._kinds[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        cut = np.append(self._apart[kinds[:-1], kinds[1:]], True)
        cut[ends - 1] = True
        places = np.flatnonzero(cut) + 1
        parts = [text[first:last] for first, last in pairwise([0, *places.tolist()])]
        found = list(map(self._known.with_new(set(parts), self._encode).__getitem__, parts))
        counts = np.searchsorted(places, ends, side="right").tolist()
        return [list(chain.from_iterable(found[first:last])) for first, last in pairwise([0, *counts])]
