"""Several processes that hold one model together, here threads: the first one writes, all learn how it went."""

import threading

import pytest

from mistral_core.errors import ConversionError, NoSpaceError, UnsupportedFeatureError
from mistral_core.weights.mixin import Saved
from mistral_core.weights.processes import written_by_first

SECONDS = 20
"""After which a process that waits for another one that is gone ends with an error."""


class Group:
    """As many processes as there are flags; a part, and a flag, is there when all of them have asked for it."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.flags = [False] * size

    def parts(self, count):
        for number in range(count):
            self.barrier.wait(SECONDS)
            yield number

    def process(self, rank):
        group = self

        class Process:
            is_first = rank == 0

            def any(self, flag):
                group.flags[rank] = flag
                group.barrier.wait(SECONDS)
                return any(group.flags)

        return Process()


def run(size, write, parts=lambda group, rank: group.parts(5)):
    """What each process raised, and what was written."""
    group, raised, written = Group(size), [None] * size, []

    def one(rank):
        try:
            written_by_first(group.process(rank), parts(group, rank), lambda stream: write(stream, written))
        except Exception as error:
            raised[rank] = error
            group.barrier.abort() if not isinstance(error, ConversionError | NoSpaceError) else None

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised, written


def test_the_first_writes_what_all_give():
    assert run(3, lambda stream, written: written.extend(stream)) == ([None] * 3, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("after", [0, 2, 5])
def test_where_the_first_cannot_write_all_end_with_an_error(after):
    def write(stream, written):
        for _ in range(after):
            written.append(next(stream))
        raise NoSpaceError("full")

    (first, *others), written = run(3, write)
    assert isinstance(first, NoSpaceError)
    assert all(isinstance(error, ConversionError) and "the first process" in str(error) for error in others)
    assert len(written) == after


@pytest.mark.parametrize("lost", [0, 1])
def test_where_a_process_is_lost_the_others_end_with_an_error(lost):
    def parts(group, rank):
        for number in group.parts(5):
            if rank == lost and number == 2:
                raise OSError("gone")
            yield number

    raised, _ = run(2, lambda stream, written: written.extend(stream), parts)
    assert all(isinstance(error, Exception) for error in raised)
    assert isinstance(raised[lost], OSError)


def test_a_model_of_several_processes_is_not_pushed():
    class Model(Saved):
        def _processes(self):
            return Group(1).process(0)

    with pytest.raises(UnsupportedFeatureError, match="save_pretrained"):
        Model().push_to_hub("a/b")
