"""Whatever stops a conversion, the old output is untouched or the new one complete, and the next run cleans up."""

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from fuzz import FORMATS, run
from samples import any_bits, assert_same, ordinary, read, write
from tqdm import tqdm

from mistral_core import TINY, convert, errors
from mistral_core.cli import main
from mistral_core.weights import manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window")  # GGUF
OLD = TINY.replace(rope_theta=7.0)
CONVERT = """
    import sys
    from mistral_core.cli import main
    sys.exit(main(["convert", *sys.argv[1:], "--overwrite", "--allow-nonfinite"]))
"""

STOPS = """
    import sys, time

    def told(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith("out"):
            print("written", flush=True)
            time.sleep(600)

    sys.addaudithook(told)
"""
"""With this before it, it says so and waits where all is written and the output is about to be put in its place."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    config = TINY.replace(vocab_size=2000)  # files of some hundred kilobytes: room for limits in the middle
    return write(tmp_path_factory.mktemp("source") / "model", "hf", ordinary(config), config)


def tree(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def start(source, target, to, before=""):
    script = textwrap.dedent(before) + textwrap.dedent(CONVERT)
    command = [sys.executable, "-c", script, str(source), str(target), "--to", to]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(process):
    process.communicate()
    assert process.returncode == 0


def old_or_new(source, target, before):
    """Whether the target is the old one, byte for byte; if not, it is the new one and verifies."""
    if tree(target) == before:
        return "old"
    manifest.verify(target, "full")
    assert_same(read(target), read(source))
    return "new"


def kill(source, tmp_path, to, delays):
    """SIGKILL after each delay in seconds; how often the old one and the new one were found."""
    target = tmp_path / "out"
    found = {"old": 0, "new": 0}
    write(target, "hf", any_bits(OLD), OLD)
    before = tree(target)
    for delay in delays:
        process = start(source, target, to)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state = old_or_new(source, target, before)
        found[state] += 1
        if state == "new":
            before = tree(target)
    finish(start(source, target, to))
    assert old_or_new(source, target, {}) == "new"
    assert os.listdir(tmp_path) == ["out"]
    return found


def test_69_killed_in_the_middle(source, tmp_path):
    assert sum(kill(source, tmp_path, "raw", (0.2, 0.5)).values()) == 2


@pytest.mark.sweep
@pytest.mark.parametrize("to", ["hf", "raw", "flax-msgpack", "keras-hub", "gguf", "orbax"])
def test_69_killed_at_a_hundred_points(source, tmp_path, to):
    started = time.monotonic()
    finish(start(source, tmp_path / "out", to))
    longest = time.monotonic() - started
    chance = random.Random(0)
    found = kill(source, tmp_path / "swept", to, [chance.uniform(0.3, 1.1) * longest for _ in range(100)])
    print(to, found)
    assert found["old"] > 0
    assert found["new"] > 0


def limited(source, target, to, size):
    """Convert with files limited to a size; whether there was room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        convert(source, target, to=to, overwrite=True, check_finite=False)
        return True
    except errors.NoSpaceError:
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def fill(source, tmp_path, to, sizes):
    target = tmp_path / "out"
    write(target, "hf", any_bits(OLD), OLD)
    before = tree(target)
    for size in sizes:
        if not limited(source, target, to, size):
            assert tree(target) == before, size
            assert os.listdir(tmp_path) == ["out"], size
        else:
            assert old_or_new(source, target, {}) == "new"
            before = tree(target)


@pytest.mark.parametrize("to", ["raw", "flax-msgpack"])
def test_67_full_disk(source, tmp_path, to):
    fill(source, tmp_path, to, (0, 100, 3000, 100_000))


@pytest.mark.sweep
@pytest.mark.parametrize("to", FORMATS)
def test_67_and_68_full_disk_at_every_size(source, tmp_path, to):
    largest = max(path.stat().st_size for path in source.iterdir())
    fill(source, tmp_path, to, [*range(0, 20_000, 400), *range(20_000, 2 * largest, largest // 20)])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_70_sigterm_and_ctrl_c_exit_with_their_own_status(source, tmp_path, number, status):
    process = start(source, tmp_path / "out", "raw", before=STOPS)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(number)
    process.communicate()
    assert process.returncode == status
    assert os.listdir(tmp_path) == []


@pytest.mark.sweep
def test_70_a_signal_at_any_moment_ends_the_command_and_leaves_nothing(source, tmp_path):
    """In forks of this process, in which all is imported, so that most signals come while it converts."""
    command = ["convert", str(source), "--to", "raw", "--allow-nonfinite"]
    assert main([*command, str(tmp_path / "warm")]) == 0
    started = time.monotonic()
    assert main([*command, str(tmp_path / "timed")]) == 0
    seconds, drawn, ended = time.monotonic() - started, random.Random(0), []
    for number in range(300):
        target = tmp_path / str(number) / "out"
        target.parent.mkdir()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        if (child := os.fork()) == 0:
            status = 1
            try:
                try:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    tqdm.set_lock(threading.RLock())  # its own is one of all forks, and kept by one that is killed
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    status = main([*command, str(target)])
                except SystemExit as left:
                    status = left.code
                finally:
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
            finally:  # a signal after the command leads here, and not into the tests that this is a fork of
                os._exit(status)
        signal.signal(signal.SIGINT, before)
        time.sleep(drawn.uniform(0, seconds))
        os.kill(child, drawn.choice([signal.SIGTERM, signal.SIGINT]))
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert set(os.listdir(target.parent)) <= {"out"}, (number, ended[-1])
    assert set(ended) <= {0, 143, 130, -signal.SIGTERM, 1}
    assert ended.count(143) + ended.count(130) > 100


def test_73_two_processes_on_one_target(source, tmp_path):
    processes = [start(source, tmp_path / "out", "raw") for _ in range(2)]
    texts = [process.communicate()[1].decode() for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes in ([0, 0], [0, 2])
    if codes == [0, 2]:
        assert any("another process is writing it" in text for text in texts)
    assert old_or_new(source, tmp_path / "out", {}) == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_74_target_in_a_directory_that_cannot_be_written(source, monkeypatch, tmp_path):
    make, locked = os.open, str(tmp_path)

    def refuse(path, flags, *rest, **options):
        if str(os.fsdecode(path) if not isinstance(path, int) else "").startswith(locked) and flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return make(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)  # root may write anywhere, so the system is told to say no
    with pytest.raises(errors.ConversionError, match="cannot be written.*Permission denied"):
        convert(source, tmp_path / "out", to="raw", check_finite=False)


@pytest.mark.parametrize("format", [name for name in FORMATS if not name.endswith("-safetensors")])
def test_60_a_byte_changed_cut_or_put_in(format):
    count, wrong = run(format, most=120)
    assert count > 80
    assert not wrong


@pytest.mark.sweep
@pytest.mark.parametrize("format", FORMATS)
def test_60_a_byte_changed_cut_or_put_in_everywhere(format):
    assert run(format)[1] == []
