"""The safe write: old or new, never between; locks; what is carried along; full disks."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk import files, into, reading
from mistral_core.errors import (
    CheckpointError,
    ChecksumMismatchError,
    ConversionError,
    MistralError,
    NoSpaceError,
    OutputBusyError,
    OutputExistsError,
    UnsafeFileError,
)
from mistral_core.generation import GenerationConfig
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import manifest
from mistral_core.weights.convert import convert
from mistral_core.weights.opening import Checkpoint


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def put(target: Path, **contents: bytes) -> None:
    with files.atomic_directory(target) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


HOLDER = """
    import fcntl, sys
    lock = open(sys.argv[1], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_lock(target: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    """The lock of a target, and another process that holds it."""
    lock = target.with_name(f"{target.name}.lock")
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(HOLDER), str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield lock, holder
        holder.kill()


# write_file


def test_write_file_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "new parent" / "a"
    files.write_file(path, b"one")
    files.write_file(bytes(path), b"two")
    assert tree(tmp_path) == {"new parent/a": b"two"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_84_write_file_mode_is_that_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_file(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_write_file_syncs_the_file_before_the_rename_and_the_directory_after(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names))[1])
    files.write_file(tmp_path / "a", b"x")
    assert [calls[1], calls[2]] == ["replace", str(tmp_path)]
    assert Path(calls[0]).name.startswith(".a.tmp-")


def test_write_file_keeps_the_old_file_when_the_write_fails(tmp_path, monkeypatch):
    files.write_file(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    with pytest.raises(NoSpaceError) as caught:
        files.write_file(tmp_path / "a", b"new")
    assert caught.value.errno == errno.EDQUOT
    assert tree(tmp_path) == {"a": b"old"}


def test_write_file_survives_short_writes(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:3], offset))
    files.write_file(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_write_file_below_a_file_is_a_conversion_error(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ConversionError, match="cannot be written") as caught:
        files.write_file(tmp_path / "a" / "b", b"")
    assert isinstance(caught.value.__cause__, OSError)


# atomic_directory


def test_76_directory_appears_whole(tmp_path):
    target = tmp_path / "made" / "on the way"
    with files.atomic_directory(target) as temporary:
        assert temporary.parent == target.parent
        assert not target.exists()
        (temporary / "a").write_bytes(b"a")
    assert tree(tmp_path) == {"made/on the way/a": b"a"}
    assert os.listdir(target.parent) == ["on the way"]


@pytest.mark.parametrize("exchange", [True, False])
def test_directory_is_swapped_and_only_other_files_are_carried(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    target = tmp_path / "out"
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "mistral_manifest.json")
    for name in (*stale, "consolidated.safetensors", "README.md", "config.json", "sub/deep/file"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(b"old")
    os.symlink("nowhere", target / "dangling")
    target.chmod(0o700)
    put(target, **{"config.json": b"new", "model.safetensors": b"new"})
    assert tree(target) == {
        "config.json": b"new",
        "model.safetensors": b"new",
        "README.md": b"old",
        "sub/deep/file": b"old",
    }
    assert os.readlink(target / "dangling") == "nowhere"
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert os.listdir(tmp_path) == ["out"]


def test_carrying_copies_where_hard_links_do_not_work(tmp_path, monkeypatch):
    put(tmp_path / "out", keep=b"old")
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
    put(tmp_path / "out", new=b"new")
    assert tree(tmp_path / "out") == {"keep": b"old", "new": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_in_the_body_changes_nothing(tmp_path, error):
    put(tmp_path / "out", a=b"old")
    with pytest.raises(error), files.atomic_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_bytes(b"new")
        raise error
    assert tree(tmp_path) == {"out/a": b"old"}


@pytest.mark.parametrize("step", ["_carry", "sync_tree", "_swap"])
def test_failure_of_any_step_changes_nothing(tmp_path, monkeypatch, step):
    put(tmp_path / "out", a=b"old")
    monkeypatch.setattr(files, step, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(NoSpaceError) as caught:
        put(tmp_path / "out", a=b"new")
    assert caught.value.errno == errno.ENOSPC
    assert tree(tmp_path) == {"out/a": b"old"}


def test_failure_between_the_two_renames_brings_the_old_one_back(tmp_path, monkeypatch):
    put(tmp_path / "out", a=b"old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    rename, seen = os.rename, []

    def second_fails(source, destination):
        seen.append(source)
        if len(seen) == 2:
            raise OSError(errno.EIO, "broken")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(ConversionError):
        put(tmp_path / "out", a=b"new")
    assert len(seen) == 3
    assert tree(tmp_path) == {"out/a": b"old"}


def test_own_errors_pass_unchanged(tmp_path):
    with pytest.raises(UnsafeFileError), files.atomic_directory(tmp_path / "out"):
        raise UnsafeFileError("mine")


def test_overwrite_false_fails_before_anything(tmp_path):
    put(tmp_path / "out", a=b"old")
    entered = False
    target = tmp_path / "out"
    with held_lock(target), pytest.raises(OutputExistsError), files.atomic_directory(target, overwrite=False):
        entered = True  # not even the lock is looked at
    assert not entered


@pytest.mark.parametrize(
    ("name", "why"),
    [("file", "must be a directory, got a file"), (".", "current directory"), ("sub", "current directory")],
)
def test_targets_that_cannot_be_replaced(tmp_path, monkeypatch, name, why):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sub" / "deeper" if name == "sub" else tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ConversionError, match=why), files.atomic_directory(tmp_path / name):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("path", ["/", "/proc"])
def test_roots_and_mount_points_are_refused(path):
    with pytest.raises(ConversionError, match="mount point"), files.atomic_directory(path):
        pass


def test_symlink_is_resolved_and_stays(tmp_path):
    put(tmp_path / "real", a=b"old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    put(tmp_path / "link", a=b"new")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"a": b"new"}


# Locks and leftovers


def test_second_writer_is_refused_while_the_first_writes(tmp_path):
    with files.atomic_directory(tmp_path / "out"):
        with pytest.raises(OutputBusyError, match="out.lock"):
            put(tmp_path / "out", a=b"second")
        assert (tmp_path / "out.lock").exists()
    assert not (tmp_path / "out.lock").exists()


def test_a_lock_of_another_process_is_respected_until_it_ends(tmp_path):
    with held_lock(tmp_path / "out") as (lock, holder):
        with pytest.raises(OutputBusyError, match=r"out\.lock"):
            put(tmp_path / "out", a=b"")
        assert lock.exists()
        holder.kill()  # it cannot tidy up
        holder.wait()
        assert lock.exists()
        put(tmp_path / "out", a=b"new")
        assert tree(tmp_path) == {"out/a": b"new"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    put(tmp_path / "out", a=b"new")
    assert tree(tmp_path) == {"out/a": b"new"}


def test_who_waits_for_a_lock_that_is_removed_takes_the_new_one(tmp_path):
    """A lock that was removed while somebody opened it is nobody's: two would hold one each."""
    lock, make = tmp_path / "out.lock", fcntl.flock
    seen = []

    def removed_between(descriptor, operation):
        make(descriptor, operation)
        if not seen:
            lock.unlink()
        seen.append(os.fstat(descriptor).st_nlink)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", removed_between)
        with files.atomic_directory(tmp_path / "out"):
            assert seen[:2] == [0, 1]
            with pytest.raises(OutputBusyError):
                put(tmp_path / "out", a=b"second")


def test_leftovers_of_dead_processes_are_swept_and_of_live_ones_kept(tmp_path):
    put(tmp_path / "out", a=b"old")
    for kind, pid in (("tmp", dead_pid()), ("old", dead_pid()), ("tmp", os.getppid())):
        (tmp_path / f".out.{kind}-{pid}-abcd").mkdir()
    (tmp_path / ".out.tmp-notes").mkdir()
    put(tmp_path / "out", a=b"new")
    assert set(os.listdir(tmp_path)) == {"out", f".out.tmp-{os.getppid()}-abcd", ".out.tmp-notes"}


def test_interrupted_fallback_swap_is_recovered(tmp_path):
    old = tmp_path / f".out.old-{dead_pid()}-abcd"
    old.mkdir()
    (old / "README").write_bytes(b"kept")
    put(tmp_path / "out", a=b"new")
    assert tree(tmp_path) == {"out/README": b"kept", "out/a": b"new"}


WRITER = """
    import os, signal, sys
    from pathlib import Path
    from mistral_core.disk import files
    mode, target = sys.argv[1], Path(sys.argv[2])
    if mode == "term":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if mode == "two renames":
        files._exchange = lambda *_: False
        rename = os.rename
        def die_after_the_first(source, destination):
            rename(source, destination)
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename = die_after_the_first
    with files.atomic_directory(target) as temporary:
        (temporary / "a").write_bytes(b"new")
        if mode != "two renames":
            os.kill(os.getpid(), signal.SIGTERM if mode == "term" else signal.SIGKILL)
"""


@pytest.mark.parametrize(("mode", "code"), [("kill", -signal.SIGKILL), ("two renames", -signal.SIGKILL), ("term", 143)])
def test_killed_writer_leaves_the_old_directory_and_the_next_run_cleans_up(tmp_path, mode, code):
    target = tmp_path / "out"
    put(target, a=b"old", b=b"kept")
    command = [sys.executable, "-c", textwrap.dedent(WRITER), mode, str(target)]
    assert subprocess.run(command, timeout=600).returncode == code
    if mode == "term":
        assert os.listdir(tmp_path) == ["out"]
    if mode != "two renames":
        assert tree(target) == {"a": b"old", "b": b"kept"}
    put(target, c=b"next")
    assert tree(tmp_path) == {"out/a": b"old", "out/b": b"kept", "out/c": b"next"}


# Full disks


def test_file_size_limit_is_no_space(tmp_path):
    put(tmp_path / "out", a=b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(NoSpaceError) as caught, files.atomic_directory(tmp_path / "out") as temporary:
            files.write_file(temporary / "a", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert tree(tmp_path) == {"out/a": b"old"}


def test_required_space_is_five_percent_more_than_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1049})())
    files.require_space(tmp_path, 999)
    with pytest.raises(NoSpaceError, match="1050 bytes") as caught:
        files.require_space(tmp_path, 1000)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["", "..", "../a", "/a", "a/b", "a\\b", "C:a", "a\0", "a\n", "\u202ea", "x" * 300])
def test_names_that_are_not_bare_are_refused(name):
    with pytest.raises(UnsafeFileError) as caught:
        files.check_bare_name(name, "index")
    assert str(caught.value).isascii()
    assert isinstance(caught.value, MistralError)


# Modes, leftovers and the manifest


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(directory: Path) -> dict[str, int]:
    return {name: stat.S_IMODE((directory / name).stat().st_mode) for name in (".", *tree(directory))}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode_and_is_never_more_open(tmp_path, monkeypatch, umask, mode):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(mode)
    seen = []
    write = files.write_at
    monkeypatch.setattr(files, "write_at", lambda d, *rest: (seen.append(os.fstat(d).st_mode & 0o777), write(d, *rest)))
    files.write_file(tmp_path / "a", b"new")
    assert seen == [mode]
    assert modes(tmp_path)["a"] == mode


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_directory_is_closed_while_it_is_written(tmp_path, umask, mode):
    target = tmp_path / "model"
    put(target, a=b"1", carried=b"2")
    assert modes(target) == {".": 0o755, "a": 0o644, "carried": 0o644}
    target.chmod(mode)
    (target / "a").chmod(0o600)
    (target / "carried").chmod(0o640)
    with files.atomic_directory(target) as temporary:
        (temporary / "a").write_bytes(b"new")
        (temporary / "b").write_bytes(b"new")
        assert modes(temporary)["."] == 0o700
    assert modes(target) == {".": mode, "a": 0o600, "b": 0o644, "carried": 0o640}


def test_nothing_is_more_open_than_its_source(tmp_path, umask):
    with files.atomic_directory(tmp_path / "model", most=0o600) as temporary:
        (temporary / "a").write_bytes(b"")
    assert modes(tmp_path / "model") == {".": 0o700, "a": 0o600}


KILLED = """
import os, sys
from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk import files, into, reading
from mistral_core.generation import GenerationConfig
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import manifest
from mistral_core.weights.convert import convert
from mistral_core.weights.opening import Checkpoint
files.os.replace = lambda *_: os.kill(os.getpid(), 9)
files.write_file(sys.argv[1], b"new")
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert [path.name.startswith(".a.tmp-") for path in tmp_path.iterdir()] == [True]
    (tmp_path / ".mine.tmp-note").write_bytes(b"the user's")
    files.write_file(tmp_path / "c", b"1")
    assert tree(tmp_path) == {"c": b"1", ".mine.tmp-note": b"the user's"}


def test_a_live_writer_s_file_is_left_alone(tmp_path):
    with files._temporary_file(tmp_path / "a") as (temporary, _):
        files.write_file(tmp_path / "b", b"1")
        assert temporary.exists()
        temporary.unlink()


def test_a_replaced_directory_carries_no_leftovers(tmp_path):
    put(tmp_path / "model", a=b"1")
    (tmp_path / "model" / ".a.tmp-1-0123abcd").write_bytes(b"")
    put(tmp_path / "model", b=b"2")
    assert set(tree(tmp_path / "model")) == {"a", "b"}


@pytest.fixture
def described(tmp_path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (directory / name).write_bytes(b"old")
    entries = {name: into._entry(b"old") for name in ("tokenizer.json", "model.safetensors")}
    (directory / into.MANIFEST).write_text(json.dumps({"files": entries, "tensors": {}, "format": 1}))
    return directory


def listed(directory: Path) -> dict[str, str]:
    return {
        name: entry["sha256"] for name, entry in json.loads((directory / into.MANIFEST).read_text())["files"].items()
    }


def test_a_later_writer_keeps_the_manifest_right(described):
    into.write_into(described, {"tokenizer.json": b"new", "more/x.jinja": b"x"})
    manifest.verify(described)
    assert listed(described)["tokenizer.json"] == into._entry(b"new")["sha256"]
    assert set(listed(described)) == {"tokenizer.json", "model.safetensors", "more/x.jinja"}


@pytest.mark.parametrize("after", range(4))
def test_a_later_writer_that_is_killed_contradicts_nothing(described, monkeypatch, after):
    real, left = files.write_file, [after]

    def write(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(into, "write_file", write)
    with pytest.raises(KeyboardInterrupt):
        into.write_into(described, {"tokenizer.json": b"new", "tokenizer_config.json": b"{}"})
    manifest.verify(described)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"files": 7}', b"[" * 100_000])
def test_a_manifest_that_is_none_is_left_as_it_is(described, text):
    (described / into.MANIFEST).write_bytes(text)
    into.write_into(described, {"tokenizer.json": b"new"})
    assert (described / into.MANIFEST).read_bytes() == text
    assert (described / "tokenizer.json").read_bytes() == b"new"


def test_what_others_wrote_is_told_with_what_to_do(described):
    (described / "tokenizer.json").write_bytes(b"abc")
    with pytest.raises(ChecksumMismatchError, match=r"tokenizer.json differ .* on purpose, write the manifest anew"):
        manifest.verify(described)


# Paths and locks that are none


NO_PATHS = ["a\0b", "\ud800", "x" * 300, "a/" * 3000 + "b", "file/below"]


@pytest.mark.parametrize("name", NO_PATHS, ids=range(len(NO_PATHS)))
def test_paths_that_are_none(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    path = f"{tmp_path}/{name}"
    with pytest.raises(ConversionError), files.atomic_directory(path):
        pass
    for write in (lambda: files.write_file(path, b""), lambda: into.write_into(path, {"a": b""})):
        with pytest.raises(ConversionError):
            write()
    with pytest.raises(ConversionError):
        convert(TINY_CHECKPOINT, path, to="raw")
    with pytest.raises(CheckpointError):
        reading.read(Path(path))


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"pid": 1, "host": "elsewhere", "start": 1}'], ids=range(3))
def test_what_a_lock_holds_does_not_matter(tmp_path, content):
    """Nobody holds it; an older release wrote its owner into it."""
    (tmp_path / "model.lock").write_bytes(content)
    put(tmp_path / "model", a=b"1")
    assert tree(tmp_path) == {"model/a": b"1"}


@pytest.mark.parametrize("kind", ["pipe", "link", "directory"])
def test_a_lock_that_is_no_file(tmp_path, kind):
    lock = tmp_path / "model.lock"
    {"pipe": os.mkfifo, "link": lambda path: os.symlink("/dev/zero", path), "directory": os.mkdir}[kind](lock)
    with pytest.raises(ConversionError):
        put(tmp_path / "model", a=b"1")


@pytest.mark.parametrize("which", ["config", "generation", "tokenizer"])
def test_what_is_saved_into_a_checkpoint_s_directory_is_in_its_manifest(tmp_path, which):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "m")
    manifest.verify(tmp_path / "m")
    if which == "config":
        MistralConfig.from_pretrained(tmp_path / "m", rope_theta=7.0).save_pretrained(tmp_path / "m")
    elif which == "generation":
        GenerationConfig(temperature=0.5).save_pretrained(tmp_path / "m")
    else:
        tokenizer = MistralTokenizer.from_pretrained(tmp_path / "m", padding_side="left")
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(tmp_path / "m")
    manifest.verify(tmp_path / "m")
    before = json.loads((TINY_CHECKPOINT / into.MANIFEST).read_text())["files"]
    assert listed(tmp_path / "m") != {name: entry["sha256"] for name, entry in before.items()}


def test_what_is_held_open_is_copied_as_itself(tmp_path):
    opened = Checkpoint.open(TINY_CHECKPOINT)
    for _ in range(3):
        copied = copy.deepcopy(opened.shards)
        assert next(iter(copied.values())).kept is next(iter(opened.shards.values())).kept
        del copied
    opened.read(next(iter(opened.tensors)))
    with pytest.raises(TypeError):
        pickle.dumps(next(iter(opened.shards.values())))
