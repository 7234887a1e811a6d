"""Threads whom no signal leaves waiting for ever.

What a signal's handler raises, Ctrl-C or a command's SIGTERM, comes between any two steps of the main thread: also
where a lock that is written in Python, as `threading` and `concurrent.futures` have them, is taken and not yet sure to
be let go; whoever asks for it then waits for ever. Here threads meet in C alone, in a lock or a SimpleQueue.
"""

from __future__ import annotations

import _thread
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Self


def processors() -> int:
    """How many processors this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Job:
    """A call that a thread runs."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call: Any = (call, arguments)
        self._value: Any = None
        self._error: BaseException | None = None
        self._unfinished = _thread.allocate_lock()
        self._unfinished.acquire()

    def run(self) -> None:
        """Do it; what it raises is kept."""
        call, arguments = self._call
        self._call = None  # what it holds may be large
        try:
            self._value = call(*arguments)
        except BaseException as error:
            self._error = error
        del call, arguments
        self._unfinished.release()

    def done(self) -> bool:
        """Whether it has ended."""
        return not self._unfinished.locked()

    def result(self) -> Any:
        """What it returns, once it has ended; raises what it has raised."""
        with self._unfinished:
            pass
        if self._error is not None:
            raise self._error
        return self._value


class Threads:
    """So many threads, which run jobs in the order in which they come.

    They end with the context: after all jobs, or, where an error leaves it, after those that are running.
    """

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running: list[Any] = []
        for _ in range(count):
            ending = _thread.allocate_lock()
            ending.acquire()
            _thread.start_new_thread(self._work, (ending,))
            self._running.append(ending)

    def _work(self, ending: Any) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # before the next one comes
        ending.release()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Job:
        """Begin a call as soon as a thread is free."""
        job = Job(call, arguments)
        self._jobs.put(job)
        return job

    def map(self, call: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What a call makes of each item, in their order; all are begun at once."""
        jobs = [self.submit(call, item) for item in items]
        return (job.result() for job in jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.end(drop=kind is not None)

    def end(self, *, drop: bool) -> None:
        """Wait until the threads have ended, after all jobs or, to `drop` the others, after those that are running."""
        if drop:
            with suppress(queue.Empty):
                while True:
                    self._jobs.get_nowait()
        for _ in self._running:
            self._jobs.put(None)
        for ending in self._running:
            with ending:
                pass
