"""A file of JSON lines of any size: what is held in memory is where its lines begin."""

from __future__ import annotations

import hashlib
import os
import weakref
from array import array
from typing import Any

from ..errors import MistralError
from . import limits, reading, strict_json

CHUNK_BYTES = 1 << 20
"""What is read at once to find the lines."""


class JsonLines:
    """The objects of a .jsonl, one a line, each read when it is asked for; blank lines are skipped.

    The file stays open, and is the same to the end: `error` is raised where it is changed meanwhile, or a line is no
    JSON object, with the path and the number of the line. In memory are 16 bytes a line. Raises what opening a file
    raises, and LimitExceededError for a line of more than `limits.LINE_BYTES`.
    """

    def __init__(self, path: reading.PathLike, *, error: type[MistralError]) -> None:
        self.path, self._error = reading.as_path(path), error
        self._begins, self._sizes, self._numbers = array("q"), array("I"), array("Q")
        with reading.opened(self.path) as descriptor:
            self._descriptor = os.dup(descriptor)
        self._open = weakref.finalize(self, os.close, self._descriptor)
        self._status = self._now()
        self.sha256 = self._found()
        """Of the whole file, in hexadecimal."""

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The object of a line, counted from 0 without blank ones."""
        if not self._open.alive:
            raise self._error(f"{self.path} must be open to be read, and was closed; open it again.")
        if self._now() != self._status:
            raise self._error(f"{self.path} must stay as it is while it is read, and was changed; start again.")
        data = reading.part(self._descriptor, self.path, self._begins[index], self._sizes[index])
        where = self.where(index)
        return strict_json.parse_object(data, where=where, error=self._error, depth=limits.LINE_DEPTH, is_line=True)

    def number(self, index: int) -> int:
        """The number of a line in the file, from 1 and with blank ones."""
        return self._numbers[index]

    def where(self, index: int) -> str:
        """How errors call a line."""
        return f"{self.path}, line {self.number(index)}"

    def size(self, index: int) -> int:
        """The bytes of a line."""
        return self._sizes[index]

    def close(self) -> None:
        """Let go of the file; it is done at the end of its life at the latest."""
        self._open()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _found(self) -> str:
        """Find the lines that are not blank; the digest of all."""
        digest = hashlib.sha256()
        at, begin, number, is_filled = 0, 0, 1, False
        while chunk := reading.part(self._descriptor, self.path, at, CHUNK_BYTES):
            digest.update(chunk)
            *ended, rest = chunk.split(b"\n")
            end = at
            for piece in ended:
                end += len(piece)
                if is_filled or piece.strip():
                    self._add(begin, end, number)
                begin, end, number, is_filled = end + 1, end + 1, number + 1, False
            is_filled = is_filled or bool(rest.strip())
            at += len(chunk)
        if is_filled:
            self._add(begin, at, number)
        return digest.hexdigest()

    def _add(self, begin: int, end: int, number: int) -> None:
        limits.check(end - begin, limits.LINE_BYTES, what="bytes", where=f"{self.path}, line {number}")
        self._begins.append(begin)
        self._sizes.append(end - begin)
        self._numbers.append(number)
