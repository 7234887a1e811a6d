"""One process beside this one that renders chat templates; ended when it takes too long, and started anew."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from ....errors import MissingExtraError, TemplateError, TemplateTimeoutError
from . import worker

SECONDS = 2.0
"""For one rendering."""
START_SECONDS = 60.0
"""For the interpreter and jinja2; a machine may be busy."""

MAX_ANSWER_BYTES = 8 * worker.MAX_PROMPT_BYTES  # JSON writes a byte as at most six
CHUNK = 1 << 16
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "TZ")
"""Of the environment: an interpreter may not start without the one, `strftime_now` needs the other."""


class TemplateProcess:
    """A process for one request after another, whichever thread they come from; made when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of `worker`.

        Raises TemplateTimeoutError after SECONDS, TemplateError where the process dies.
        """
        line = json.dumps(request | {"seconds": SECONDS + 1}).encode() + b"\n"
        if len(line) > worker.MAX_ARGUMENT_BYTES:
            most = worker.MAX_ARGUMENT_BYTES >> 20
            raise TemplateError(f"chat template: {len(line)} bytes of messages, at most {most} MB; shorten them.")
        with self._lock:
            try:
                answer = _exchange(self._running(), line, SECONDS)
            except TimeoutError as cause:
                self.close()
                raise TemplateTimeoutError(
                    f"chat template: not done after {SECONDS:g} s and ended; correct its loops, or send less."
                ) from cause
            except BaseException:
                self.close()  # after an interruption an old answer must not meet a new question
                raise
            if answer.get("error") == "memory":
                self.close()
            return answer

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            _close_pipes(process)

    def forget(self) -> None:
        """Leave the process to the parent of a fork."""
        process, self._process = self._process, None
        self._lock = threading.Lock()  # another thread may have held it when the fork was made
        if process is not None:
            process.returncode = 0  # else Popen warns of a process that is not ours
            _close_pipes(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._process = _start()
            try:
                ready = _exchange(self._process, b"", START_SECONDS)
            except TimeoutError as cause:
                raise TemplateError(
                    f"chat template: no process after {START_SECONDS:g} s; try again when the machine is less busy."
                ) from cause
            if "error" in ready:
                raise MissingExtraError(f"chat templates: {ready['message']}; {_INSTALL}.")
        return self._process


_INSTALL = "pip install 'jinja2>=3.1.6'"


def _start() -> subprocess.Popen[bytes]:
    # isolated (-I) and without site (-S): no path, no hook and no variable of the user's has a say in it
    command = [sys.executable, "-I", "-S", "-X", "utf8", worker.__file__, *_paths()]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C in a terminal is not meant for it
        )
    except OSError as cause:
        raise TemplateError(f"chat template: no process for it ({cause}); free some memory or processes.") from cause
    os.set_blocking(_pipe(process.stdin).fileno(), False)
    return process


def _paths() -> list[str]:
    """The directories that jinja2 and what it imports are in."""
    found = []
    for name in ("jinja2", "markupsafe"):
        module = importlib.util.find_spec(name)
        if module is None or module.origin is None:
            raise MissingExtraError(f"chat templates need {name}; {_INSTALL}.")
        found.append(str(Path(module.origin).parents[1]))
    return sorted(set(found))


def _exchange(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any]:
    """Send a line, read a line; raises TimeoutError, and TemplateError where the process dies."""
    deadline, unsent, received = time.monotonic() + seconds, memoryview(line), bytearray()
    given, taken = _pipe(process.stdin), _pipe(process.stdout)
    with selectors.DefaultSelector() as selector:
        selector.register(taken, selectors.EVENT_READ)
        if unsent:
            selector.register(given, selectors.EVENT_WRITE)
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = {key.fileobj for key, _ in selector.select(left)}
            if given in ready:
                with contextlib.suppress(BrokenPipeError):  # the other pipe says the same
                    unsent = unsent[os.write(given.fileno(), unsent[:CHUNK]) :]
                if not unsent:
                    selector.unregister(given)
            if taken in ready:
                chunk = os.read(taken.fileno(), CHUNK)
                received += chunk
                if not chunk or len(received) > MAX_ANSWER_BYTES:
                    raise TemplateError("chat template: its process died; shorten and simplify the template.")
    answer: dict[str, Any] = json.loads(received)
    return answer


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # Popen was asked for it
    return pipe


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        _pipe(pipe).close()


PROCESS = TemplateProcess()
"""The one of this process."""

atexit.register(PROCESS.close)
os.register_at_fork(after_in_child=PROCESS.forget)
