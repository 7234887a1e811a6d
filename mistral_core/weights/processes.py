"""Several processes that hold one model together: the first one writes, all give their parts, all learn how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from ..errors import ConversionError

T = TypeVar("T")


class Processes(Protocol):
    """What a backend says of the processes that hold a model together."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any of them; each waits here for all of them."""


def written_by_first(processes: Processes, parts: Iterable[T], write: Callable[[Iterator[T]], None]) -> None:
    """Let the first process write a stream, whose every item all processes make together.

    The others take the stream to its end, so that none waits for a part that another does not give; so does the first
    where it cannot write. Raises what `write` raises, and ConversionError in the processes that did not write.
    """
    stream, error = iter(parts), None
    if processes.is_first:
        try:
            write(stream)
        except Exception as raised:  # told to the others, then raised
            error = raised
    try:
        for _ in stream:
            pass
        failed = processes.any(error is not None)
    except Exception:  # another process is gone; what was wrong here came before
        if error is None:
            raise
        failed = True
    if error is not None:
        raise error
    if failed:
        raise ConversionError("save: the first process could not write, and says why.")
