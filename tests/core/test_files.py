"""The safe write: old or new, never between; locks; what is carried along; full disks."""

import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mistral_core.disk import files
from mistral_core.errors import (
    ConversionError,
    MistralError,
    NoSpaceError,
    OutputBusyError,
    OutputExistsError,
    UnsafeFileError,
)


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


def lock_of(target: Path, **changes: object) -> Path:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": files._start_time(os.getpid())}
    lock = target.with_name(f"{target.name}.lock")
    lock.write_text(json.dumps({**owner, **changes}))
    return lock


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
    lock_of(tmp_path / "out")  # not even the lock is looked at
    entered = False
    with pytest.raises(OutputExistsError), files.atomic_directory(tmp_path / "out", overwrite=False):
        entered = True
    assert not entered


@pytest.mark.parametrize(
    ("name", "why"), [("file", "is a file"), (".", "current directory"), ("sub", "current directory")]
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


def test_live_lock_of_another_process_and_host_is_respected(tmp_path):
    for changes in (
        {"pid": os.getppid(), "start": files._start_time(os.getppid())},
        {"host": "elsewhere", "pid": dead_pid()},
    ):
        lock = lock_of(tmp_path / "out", **changes)
        with pytest.raises(OutputBusyError):
            put(tmp_path / "out", a=b"")
        assert lock.exists()


def test_stale_locks_are_recovered(tmp_path):
    for changes in ({"pid": dead_pid()}, {"start": 1}):
        lock = lock_of(tmp_path / "out", **changes)
        put(tmp_path / "out", a=b"new")
        assert not lock.exists()


def test_unreadable_lock_is_live_while_young(tmp_path):
    lock = tmp_path / "out.lock"
    lock.write_bytes(b"")
    with pytest.raises(OutputBusyError):
        put(tmp_path / "out", a=b"")
    os.utime(lock, (0, 0))
    put(tmp_path / "out", a=b"new")
    assert tree(tmp_path) == {"out/a": b"new"}


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
    assert subprocess.run(command, timeout=30).returncode == code
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
