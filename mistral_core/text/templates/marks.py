"""What users wrote, marked, so that it is known again in what a template makes of it.

A mark is a private character in the place of one that begins or ends a control token: as long as the original,
no white space, and nowhere else in the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from ...errors import TemplateError
from ..segments import Control, Segment

PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Unicode's private use areas."""


def unused_characters(*texts: str) -> Iterator[str]:
    """Private characters that are in none of some texts; raises TemplateError where they run out."""
    used = set().union(*texts)
    for area in PRIVATE:
        yield from (chr(code) for code in area if chr(code) not in used)
    raise TemplateError("messages: use every private character of Unicode; remove some.")


class Marks:
    """The marks of some control tokens."""

    def __init__(self, controls: tuple[str, ...], unused: Iterator[str]) -> None:
        self._parts = _parts_of(controls)
        self._marks = {ord(each): next(unused) for each in self._parts.ends}
        self._originals = {ord(mark): chr(each) for each, mark in self._marks.items()}

    def everywhere(self, text: str) -> str:
        """Every character marked that begins or ends a control token: no part of the text can become one."""
        return text.translate(self._marks)

    def where_needed(self, text: str) -> str:
        """Control tokens marked, and halves of one at the ends of the text, for templates that look at the rest."""
        halves = self._halves(text)
        text = "".join(each.translate(self._marks) if at in halves else each for at, each in enumerate(text))
        while self._parts.whole.search(text):  # again, for one may stand within another
            text = self._parts.whole.sub(self._broken, text)
        return text

    def removed(self, text: str) -> str:
        """The text without marks."""
        return text.translate(self._originals)

    def split(self, text: str) -> list[Segment]:
        """The control tokens in a marked text, and without its marks the text between them."""
        found: list[Segment] = []
        at = 0
        for match in self._parts.whole.finditer(text):
            found += [self.removed(text[at : match.start()]), Control(match[0])]
            at = match.end()
        return [each for each in (*found, self.removed(text[at:])) if each]

    def _broken(self, match: re.Match[str]) -> str:
        token = match[0]
        return self.everywhere(token[0]) + token[1:-1] + self.everywhere(token[1:][-1:])

    def _halves(self, text: str) -> set[int]:
        """Where a control token begins that the text ends in, or one ends that the text begins with; trimmed or not."""
        begin, end, longest = len(text) - len(text.lstrip()), len(text.rstrip()), self._parts.longest
        before = {
            stop - size
            for stop in (len(text), end)
            for size in range(1, min(longest, stop + 1))
            if self._parts.begins(text[stop - size : stop])
        }
        return before | {
            start + size - 1
            for start in (0, begin)
            for size in range(1, min(longest, len(text) - start + 1))
            if self._parts.ends_in(text[start : start + size])
        }


class _Parts(NamedTuple):
    whole: re.Pattern[str]
    ends: frozenset[str]
    """First and last characters."""
    forwards: list[str]
    """The tokens, sorted."""
    backwards: list[str]
    """Each token read from its end, sorted."""
    longest: int

    def begins(self, part: str) -> bool:
        """Whether a part, not all, of a token is its beginning."""
        return _has_beginning(self.forwards, part)

    def ends_in(self, part: str) -> bool:
        """Whether a part, not all, of a token is its end."""
        return _has_beginning(self.backwards, part[::-1])


def _has_beginning(tokens: list[str], part: str) -> bool:
    """Whether one of sorted tokens begins with a text and goes on: its neighbour in their order does, if any."""
    at = bisect_right(tokens, part)
    return at < len(tokens) and tokens[at].startswith(part)


@lru_cache(8)
def _parts_of(controls: Iterable[str]) -> _Parts:
    tokens = sorted(filter(None, controls), key=len, reverse=True)  # of two at one place, the longer one
    return _Parts(
        whole=re.compile("|".join(map(re.escape, tokens)) or "(?!)"),
        ends=frozenset(each for token in tokens for each in (token[0], token[-1])),
        forwards=sorted(tokens),
        backwards=sorted(token[::-1] for token in tokens),
        longest=max(map(len, tokens), default=0),
    )
