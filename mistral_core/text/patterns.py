"""Regular expressions of tokenizer files: refused where a text could make them try without end.

Oniguruma searches by trying. Every repetition that something after it can fail upon multiplies the tries, so that one
with another in it, or two in a row, never ends on some texts. The patterns that were published for any tokenizer have
at most one that runs on, and then stop, or are the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ..disk import limits
from ..errors import MistralError, TokenizerError

_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d*)(,?)(\d*)\}\??")
_GROUP = re.compile(r"\(\?(?:(:|>|=|!|<=|<!|<\w+>|'\w+')|([imx-]*)([:)]))")
_ASSERTION = re.compile(r"[\^$]|\\[bBAzZGK]")
_ATOM = re.compile(r"\\[pP]\{\^?[\w ]+\}|\\x\{[0-9a-fA-F]+\}|\\[^kg1-9]|[^\\()|\[]", re.DOTALL)
_LOOKS = ("=", "!", "<=", "<!")


class _Refused(Exception):
    """Why a pattern is not taken."""


class _Item(NamedTuple):
    """What stands in a sequence: a character, an assertion or a group, as often as it may."""

    branches: Sequence[Sequence[_Item]] = ()
    """Of a group."""
    width: bool = True
    """Whether it takes characters; an assertion takes none."""
    least: int = 1
    most: int | None = 1
    """How often; None without end."""

    @property
    def repeats(self) -> bool:
        return self.most != 1 or self.least != 1


def check(pattern: str, where: str, *, error: type[MistralError] = TokenizerError) -> None:
    """Raise `error` for a pattern that may try without end, that calls itself, or that is too long."""
    limits.check(len(pattern), limits.PATTERN_CHARACTERS, what="characters of a pattern", where=where)
    try:
        branches, end = _branches(pattern, 0, 0)
        if end < len(pattern):
            raise _Refused("a bracket is closed that was not opened")
        for branch in branches:
            endless, tries = _tries(branch, False)
            if endless > 1:
                raise _Refused("two repetitions without end, and more after them, in a row")
            if tries > limits.PATTERN_TRIES:
                raise _Refused(f"{tries} ways to match one place, at most {limits.PATTERN_TRIES} are tried")
    except _Refused as problem:
        raise error(f"{where}: the pattern {pattern[:80]!a} has {problem}; put a simpler one there.") from None


def _branches(pattern: str, at: int, depth: int) -> tuple[list[list[_Item]], int]:
    """The alternatives from a place to the end of their group, and where that is."""
    if depth > limits.PATTERN_DEPTH:
        raise _Refused(f"groups deeper than {limits.PATTERN_DEPTH} levels")
    branches: list[list[_Item]] = [[]]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            branches.append([])
            at += 1
            continue
        item, at = _item(pattern, at, depth)
        while found := _QUANTIFIER.match(pattern, at):
            item, at = _repeated(item, found), found.end()
        branches[-1].append(item)
    return branches, at


def _item(pattern: str, at: int, depth: int) -> tuple[_Item, int]:
    if pattern[at] == "(":
        return _group(pattern, at, depth)
    if pattern[at] == "[":
        return _Item(), _end_of_class(pattern, at)
    if found := _ASSERTION.match(pattern, at):
        return _Item(width=False), found.end()
    if found := _ATOM.match(pattern, at):
        return _Item(), found.end()
    raise _Refused("a reference to a part of itself")


def _group(pattern: str, at: int, depth: int) -> tuple[_Item, int]:
    found = _GROUP.match(pattern, at)
    if found is None and pattern[at + 1 : at + 2] in ("?", "*"):
        raise _Refused(f"a group of an unknown kind, {pattern[at : at + 4]!a}")
    kind, flags, end = found.groups() if found else (":", None, None)
    if flags and "x" in flags:
        raise _Refused("comments in it")
    branches, at = _branches(pattern, found.end() if found else at + 1, depth + 1)
    if end == ")":  # flags for the rest of the group around, whose end is not this one's to take
        return _Item(branches), at
    if at == len(pattern):
        raise _Refused("a bracket that is not closed")
    return _Item(branches, width=kind not in _LOOKS), at + 1


def _end_of_class(pattern: str, at: int) -> int:
    """Where a set of characters ends, with the sets in it."""
    depth, first = 0, at
    while at < len(pattern):
        letter = pattern[at]
        if letter == "\\":
            at += 1
        elif letter == "[":
            depth += 1
            first = at + 2 if pattern[at + 1 : at + 2] == "^" else at + 1
        elif letter == "]" and at != first:
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise _Refused("a set of characters that is not closed")


def _repeated(item: _Item, found: re.Match[str]) -> _Item:
    """An item under a quantifier."""
    letter, (least, comma, most) = found[0][0], found.groups(default="")
    if letter != "{":
        low, high = (int(letter == "+"), 1 if letter == "?" else None)
    elif max(int(each[:6] or 0) for each in (least, most)) > limits.PATTERN_REPEATS:
        raise _Refused(f"a repetition of more than {limits.PATTERN_REPEATS}")
    else:
        low = int(least or 0)
        high = int(most) if most else None if comma else low
    if high != 1 and (item.repeats or not item.width or len(item.branches) > 1 or any(map(_varies, item.branches))):
        raise _Refused("a repetition or a choice within a repetition")
    if item.repeats:  # under a question mark
        return item._replace(least=0)
    return item._replace(least=low, most=high)


def _varies(sequence: Sequence[_Item]) -> bool:
    """Whether a sequence may be matched in several ways; three digits may not."""
    return any(
        each.least != each.most or len(each.branches) > (0 if each.repeats else 1) or any(map(_varies, each.branches))
        for each in sequence
    )


def _tries(sequence: Sequence[_Item], fails: bool) -> tuple[int, int]:
    """(repetitions without end that multiply, ways besides) of a sequence after which a match may fail or not."""
    endless, ways = 0, 1
    for item in reversed(sequence):
        inside = [_tries(branch, fails and item.width) for branch in item.branches]
        endless += max((count for count, _ in inside), default=0)
        ways *= max((count for _, count in inside), default=1)
        if fails:
            ways *= max(len(item.branches), 1)
            if item.most is None:
                endless += 1
            else:
                ways *= item.most - item.least + 1
        fails = fails or item.least > 0
    return endless, ways
