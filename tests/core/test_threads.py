"""Threads of the core: jobs in order, errors where they are asked for, and no signal that leaves anybody waiting."""

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import mistral_core.threads
from mistral_core.disk.undisturbed import undisturbed
from mistral_core.threads import Threads


def test_results_come_in_the_order_of_the_items():
    with Threads(3) as threads:
        assert list(threads.map(lambda n: (time.sleep(0.01 / (n + 1)), n * n)[1], range(7))) == [
            n * n for n in range(7)
        ]


def test_jobs_run_beside_each_other():
    with Threads(2) as threads:
        both = threading.Barrier(2, timeout=600)
        assert {job.result() for job in [threads.submit(both.wait), threads.submit(both.wait)]} == {0, 1}


def test_what_a_job_raises_its_result_raises():
    with Threads(1) as threads:
        failed, after = threads.submit(int, "x"), threads.submit(int, "7")
        with pytest.raises(ValueError, match="invalid literal"):
            failed.result()
        assert after.result() == 7


def test_a_job_is_done_when_it_has_ended():
    go = threading.Event()
    with Threads(1) as threads:
        job = threads.submit(go.wait, 600)
        assert not job.done()
        go.set()
        assert job.result()
        assert job.done()


def test_all_jobs_are_done_at_the_end_and_after_an_error_those_that_run():
    done = []
    with Threads(1) as threads:
        for number in range(5):
            threads.submit(done.append, number)
    assert done == [0, 1, 2, 3, 4]
    begun, go = threading.Event(), threading.Event()

    def first():
        begun.set()
        go.wait(600)
        done.append("first")

    with pytest.raises(KeyboardInterrupt), Threads(1) as threads:
        threads.submit(first)
        threads.submit(done.append, "second")
        begun.wait(600)
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert done[5:] == ["first"]


SIGNALLED = """
import random, signal, sys
{pool}

class Stop(BaseException):
    pass

def stop(*_):
    raise Stop

signal.signal(signal.SIGALRM, stop)
random.seed(0)
stopped = 0
for _ in range(2000):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 1e-3))
            with Threads(2) as threads:
                while True:
                    jobs = [threads.submit(sum, range(50)) for _ in range(3)]
                    [job.result() for job in jobs]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Stop:
        stopped += 1
print(stopped)
"""


def test_the_core_has_no_other_pool():
    sources = Path(mistral_core.__file__).parent.rglob("*.py")
    assert [path for path in sources if re.search(r"concurrent\.futures|multiprocessing\.pool", path.read_text())] == [
        Path(mistral_core.threads.__file__)  # where it says why
    ]


def test_no_signal_leaves_anybody_waiting():
    """Whose handler raises, wherever it comes; the standard library's pool hangs, or lets go a lock that it has not."""
    code = SIGNALLED.format(pool="from mistral_core.threads import Threads")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert run.stdout == "2000\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_comes_after_what_must_not_be_disturbed(number):
    def stop(*_):
        raise InterruptedError

    before, done = signal.signal(number, stop), []
    try:
        with pytest.raises(InterruptedError), undisturbed():
            signal.raise_signal(number)
            done.append("whole")
        assert done == ["whole"]
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)


def test_an_error_passes_what_is_undisturbed_and_other_threads_too():
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), undisturbed():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is handler

    def elsewhere():
        with undisturbed():
            return signal.getsignal(signal.SIGINT)

    with Threads(1) as threads:
        assert threads.submit(elsewhere).result() is handler
