"""Work beside each other: two at a time, never more bytes than the budget, and no error lost."""

import threading

import pytest

from mistral_core.weights.workers import Workers


def test_two_small_ones_run_beside_each_other():
    both = threading.Barrier(2, timeout=600)
    with Workers(10) as workers:
        workers.submit(5, both.wait)
        workers.submit(5, both.wait)


def test_no_more_bytes_than_the_budget_are_held():
    lock, held, most, done = threading.Lock(), [0], [0], []

    def work(size):
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])
        threading.Event().wait(0.002)
        with lock:
            held[0] -= size
            done.append(size)

    sizes = [3, 10, 1, 1, 9, 2, 10, 10, 4, 6, 5, 5]
    with Workers(10) as workers:
        for size in sizes:
            workers.submit(size, work, size)
    assert sorted(done) == sorted(sizes)
    assert most[0] <= 10


def test_an_error_is_raised_and_what_waits_is_let_go():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), Workers(10) as workers:
        workers.submit(10, fail)
    with pytest.raises(KeyboardInterrupt), Workers(10) as workers:
        workers.submit(10, fail)
        raise KeyboardInterrupt
