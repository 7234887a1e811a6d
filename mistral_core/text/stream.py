"""The text of ids that come one by one: never half a character, never part of what ends it; transformers' streamers."""

from __future__ import annotations

import contextlib
import copy
import queue
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from ..errors import InputError
from ..telling import printable

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, and so at most tokens, of one character in UTF-8."""


class DecodesIds(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids."""


class TextStream:
    """Turns ids into text as they come; what is pushed and ended adds up to the text of all ids together.

    `after` are the ids before the first one pushed, such as a prompt: then the first word keeps its space.
    Bytes that are no UTF-8 come out as U+FFFD once they can no longer be completed.
    """

    def __init__(self, tokenizer: DecodesIds, *, after: Iterable[int] = (), skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._before = list(after)  # kept, because how an id reads depends on what stands before it
        self._waiting: list[int] = []
        self._shown = 0  # characters of those waiting

    def push(self, token_id: int) -> str:
        """The characters that this id completes; often none or several."""
        self._waiting.append(token_id)
        before, text = self._decode(self._before), self._decode(self._before + self._waiting)
        if text == before:  # a special token, or the space that a text does not begin with
            self._before, self._waiting = self._before + self._waiting, []
            return ""
        start = len(before) + self._shown
        if not text.endswith(REPLACEMENT):
            self._before, self._waiting, self._shown = self._waiting, [], 0
            return text[start:]
        # the last three tokens may be the beginning of a character; what is before them stays as it is
        settled = self._decode(self._before + self._waiting[: 1 - LONGEST_CHARACTER])
        final = max(len(text.rstrip(REPLACEMENT)), len(settled), start)
        self._shown = final - len(before)
        if len(self._waiting) > 4 * LONGEST_CHARACTER:
            old, self._waiting = self._waiting[: 1 - LONGEST_CHARACTER], self._waiting[1 - LONGEST_CHARACTER :]
            self._before, self._shown = old, final - len(settled)
        return text[start:final]

    def end(self) -> str:
        """What is still held back; call it once after the last id."""
        return self._decode(self._before + self._waiting)[len(self._decode(self._before)) + self._shown :]

    def copy(self) -> TextStream:
        """One that goes on from here on its own."""
        made = copy.copy(self)
        made._before, made._waiting = list(self._before), list(self._waiting)
        return made

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class StoppingStream:
    """A TextStream that ends before the first of some texts, and never shows a part of one.

    The text whose end comes first counts; what might yet become one is held back.
    """

    def __init__(
        self,
        tokenizer: DecodesIds,
        stops: Sequence[str],
        *,
        after: Iterable[int] = (),
        skip_special_tokens: bool = True,
    ):
        self._stream = TextStream(tokenizer, after=after, skip_special_tokens=skip_special_tokens)
        self._stops, self._held = stops, ""
        self.stopped = False
        """Whether one of the texts has come."""

    def push(self, token_id: int) -> str:
        """The text that this id makes certain; nothing after the end."""
        return "" if self.stopped else self._certain(self._stream.push(token_id))

    def end(self) -> str:
        """What is still held back; call it once after the last id."""
        return "" if self.stopped else self._certain(self._stream.end()) + ("" if self.stopped else self._held)

    def copy(self) -> StoppingStream:
        """One that goes on from here on its own."""
        made = copy.copy(self)
        made._stream = self._stream.copy()
        return made

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        possible = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - possible :]
        return text[: len(text) - possible]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop`, not all of it, with which a text ends."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def telling(streamer: Any) -> Iterator[None]:
    """A call that tells a streamer, if there is one: it is told the end whatever happens, ours the error too."""
    try:
        yield
    except BaseException as error:
        failing(streamer, error)
        raise
    if streamer is not None:
        streamer.end()


@contextlib.contextmanager
def beginning(streamer: Any) -> Iterator[None]:
    """The part of a call before it tells a streamer anything: an error is its end."""
    try:
        yield
    except BaseException as error:
        failing(streamer, error)
        raise


def failing(streamer: Any, error: BaseException) -> None:
    """Tell a streamer that nothing more comes, because of an error."""
    if isinstance(streamer, TextStreamer):
        streamer.error = error
    if streamer is not None:
        streamer.end()


class TextStreamer:
    """What `generate(streamer=...)` tells of the tokens it makes, printed as text up to a stop string; one row."""

    def __init__(
        self,
        tokenizer: DecodesIds,
        skip_prompt: bool = False,
        *,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.skip_prompt, self.skip_special_tokens = tokenizer, skip_prompt, skip_special_tokens
        self.stop_strings = stop_strings
        self.error: BaseException | None = None
        """What ended the last call before its time."""
        self._text: StoppingStream | None = None

    def put(self, value: Any) -> None:
        """Prompt ids [1, T] first, then the tokens [1] of each step; raises InputError for several rows or calls."""
        rows = value.shape[0] if len(value.shape) == 2 or self._text is not None else 1
        if rows > 1:
            raise InputError(f"TextStreamer: {rows} rows; a text streamer shows one.")
        ids = [int(token) for token in value.reshape(-1)]
        if self._text is not None:
            if len(value.shape) > 1:
                raise InputError("TextStreamer: a call has begun before the last one ended; give each its own.")
            for token in ids:
                self._show(self._text.push(token))
            return
        self.begin()
        self._text = StoppingStream(
            self.tokenizer, self.stop_strings, after=ids, skip_special_tokens=self.skip_special_tokens
        )
        if not self.skip_prompt:
            self._show(self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens))

    def begin(self) -> None:
        """A call begins."""
        self.error = None

    def end(self) -> None:
        """No more tokens come; the next call starts anew."""
        text, self._text = self._text, None
        self.on_finalized_text(text.end() if text is not None else "", stream_end=True)

    def _show(self, piece: str) -> None:
        if piece:
            self.on_finalized_text(piece)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, in a terminal what it would obey as escapes; a subclass does with it what it likes."""
        print(printable(text) if sys.stdout.isatty() else text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """A TextStreamer whose pieces are iterated over, in another thread than the one that generates.

    The iteration ends with the call, whatever ended it; `error` says what, where it was an error. What a loop that was
    left did not read is not read by the loop over the next call.
    """

    def __init__(
        self,
        tokenizer: DecodesIds,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, stop_strings=stop_strings)
        self._pieces: queue.Queue[str | None] = queue.Queue()
        self._was_left = False
        self.timeout = timeout
        """Seconds to wait for a piece; then queue.Empty is raised."""

    def begin(self) -> None:
        """A call begins: what is left of an earlier one whose reader went away is forgotten."""
        super().begin()
        with contextlib.suppress(queue.Empty):
            while self._was_left:
                self._pieces.get_nowait()
        self._was_left = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put a piece into the queue."""
        self._pieces.put(text)
        if stream_end:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        self._was_left = False
        try:
            yield from iter(self._next, None)
        except GeneratorExit:
            self._was_left = True
            raise

    def __next__(self) -> str:
        self._was_left = False
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    def _next(self) -> str | None:
        return self._pieces.get(timeout=self.timeout)
