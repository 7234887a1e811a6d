"""Two threads for work on tensors that NumPy, hashing and the system do without Python, bounded in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Self

from ..threads import Job, Threads

THREADS = 2


class Workers:
    """Runs calls beside each other as long as the tensors they hold are together no larger than the largest one.

    The first error of a call is raised by the next `submit`, or on leaving.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._threads = Threads(THREADS)
        self._running: deque[tuple[Job, int]] = deque()

    def submit(self, size: int, call: Callable[..., Any], *arguments: Any) -> None:
        """Begin a call that holds a tensor of so many bytes, once there is room for it."""
        while self._running and (len(self._running) == THREADS or self._held() + size > self._budget):
            self._finish_first()
        self._running.append((self._threads.submit(call, *arguments), size))

    def _held(self) -> int:
        return sum(size for job, size in self._running if not job.done())

    def _finish_first(self) -> None:
        self._running.popleft()[0].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._running and kind is None:
                self._finish_first()
        finally:
            self._threads.end(drop=True)
