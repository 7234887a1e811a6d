"""TextStream: the text of ids that arrive one by one, never half a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, and so at most tokens, of one character in UTF-8."""


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""


class TextStream:
    """Turns ids into text as they come; what is pushed and ended adds up to the text of all ids together.

    `after` are the ids before the first one pushed, such as a prompt: then the first word keeps its space.
    Bytes that are no UTF-8 come out as U+FFFD once they cannot be completed any more.
    """

    def __init__(self, tokenizer: Decoder, *, after: Iterable[int] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._shown = list(after)  # kept, because how an id reads depends on what stands before it
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The characters that this id completes; often none or several."""
        self._waiting.append(token_id)
        before, text = self._decode(self._shown), self._decode(self._shown + self._waiting)
        if text == before:  # a special token, or the space that a text does not begin with
            self._shown, self._waiting = self._shown + self._waiting, []
            return ""
        unfinished = text.endswith(REPLACEMENT) and len(self._waiting) < LONGEST_CHARACTER
        return "" if unfinished else self._show(before, text)

    def end(self) -> str:
        """What is still held back; call it once after the last id."""
        if not self._waiting:
            return ""
        return self._show(self._decode(self._shown), self._decode(self._shown + self._waiting))

    def _show(self, before: str, text: str) -> str:
        self._shown, self._waiting = self._waiting, []
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
