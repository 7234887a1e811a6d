"""The one way to read a file: what is refused, what links may do, and a directory that is held while it is replaced."""

import ast
import errno
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

import mistral_core
from mistral_core.config import MistralConfig
from mistral_core.disk import limits, reading
from mistral_core.disk.reading import held
from mistral_core.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LimitExceededError,
    UnsafeFileError,
)
from mistral_core.generation import GenerationConfig
from mistral_core.text import sources
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import manifest, push
from mistral_core.weights.convert import convert
from mistral_core.weights.opening import Checkpoint

CORE = Path(mistral_core.__file__).parent
TINY = CORE / "data" / "tiny"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, in a directory with a secret beside it."""
    (tmp_path / "secret").write_text('{"SECRET": 1}')
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "mistral_manifest.json").unlink()
    return tmp_path / "tiny"


# What is no file


def put(path: Path, kind: str) -> Path:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{folder}/{path.name}")  # a path of more than 108 bytes cannot be bound
            os.close(folder)
    else:
        path.symlink_to({"link": "../secret", "absolute link": path.parents[1] / "secret"}.get(kind, "/dev/zero"))
    return path


KINDS = ("pipe", "directory", "socket", "link", "absolute link", "device")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_its_directory_is_refused(tmp_path, kind):
    (tmp_path / "secret").write_text("SECRET")
    (tmp_path / "d").mkdir()
    path = put(tmp_path / "d" / "x", kind)
    for each in (path, held(tmp_path / "d") / "x", Path(os.path.relpath(path))):
        for ask in (reading.read, reading.size_of, lambda path: reading.head(path, 4)):
            with pytest.raises(UnsafeFileError) as caught:
                ask(each)
            assert str(each) in str(caught.value)
            assert "SECRET" not in str(caught.value)


READERS = {
    "config.json": lambda path: Checkpoint.open(path).config,
    "params.json": lambda path: Checkpoint.open(path).config,
    "model.safetensors": Checkpoint.open,
    "model.safetensors.index.json": Checkpoint.open,
    "mistral_manifest.json": lambda path: manifest.verify(path, "sizes"),
    "generation_config.json": GenerationConfig.from_pretrained,
    "tokenizer.json": MistralTokenizer.from_pretrained,
    "tokenizer_config.json": MistralTokenizer.from_pretrained,
    "tekken.json": MistralTokenizer.from_pretrained,
    "tokenizer.model.v3": lambda path: sources.found_in(path)["tokenizer.model.v3"](),
    "chat_template.jinja": MistralTokenizer.from_pretrained,
    "chat_template.json": MistralTokenizer.from_pretrained,
    "additional_chat_templates/a.jinja": MistralTokenizer.from_pretrained,
    "LICENSE": lambda path: [read() for read in Checkpoint.open(path).texts.values()],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_every_file_of_a_checkpoint_is_opened_so(tiny, name, kind):
    (tiny / name).parent.mkdir(exist_ok=True)
    if name.count("/") and "link" in kind:
        (tiny / "secret").symlink_to("../secret")
    put(tiny / name, kind)
    with pytest.raises(UnsafeFileError):
        READERS[name](tiny)


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "README.md", "chat_template.json", "tokenizer.model.v3"])
def test_convert_and_push_copy_nothing_from_elsewhere(tiny, tmp_path, name):
    put(tiny / name, "link")
    with pytest.raises(UnsafeFileError, match=rf"{name}: a link that leads out"):
        push._contents(Checkpoint.open(tiny))
    if name != "README.md":  # it is not converted
        with pytest.raises(UnsafeFileError, match="a link that leads out"):
            convert(tiny, tmp_path / "out", to="hf")
        assert not (tmp_path / "out").exists()


# What links may do


def test_links_within_the_directory_are_followed(tmp_path):
    (tmp_path / "d" / "real").mkdir(parents=True)
    (tmp_path / "d" / "real" / "x").write_text("x")
    (tmp_path / "d" / "folder").symlink_to("real")
    (tmp_path / "d" / "a").symlink_to("folder/x")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "d" / "folder" / ".." / "a")
    root = held(tmp_path / "d")
    for name in ("a", "b", "folder/x", "real/x"):
        assert reading.read(root / name) == b"x"
        assert (root / name).exists()
        assert (root / name).is_file()
    assert (root / "folder").is_dir()
    assert (root / "folder").is_symlink()
    assert reading.names(root / "folder") == ["x"]


def test_a_link_to_itself_ends(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError) as caught:
        reading.read(tmp_path / "a")
    assert caught.value.errno


def test_snapshots_of_the_hub_lead_to_the_blobs_of_their_repository(tmp_path):
    for repository in ("models--u--m", "models--u--other"):
        (tmp_path / repository / "blobs").mkdir(parents=True)
        (tmp_path / repository / "blobs" / "e1").write_text(repository)
        (tmp_path / repository / "snapshots" / "c" / "sub").mkdir(parents=True)
    snapshot = tmp_path / "models--u--m" / "snapshots" / "c"
    (snapshot / "x").symlink_to("../../blobs/e1")
    (snapshot / "sub" / "y").symlink_to("../../../blobs/e1")
    (snapshot / "stolen").symlink_to("../../../models--u--other/blobs/e1")
    for path in (snapshot / "x", snapshot / "sub" / "y", held(snapshot) / "x", held(snapshot) / "sub" / "y"):
        assert reading.read(path) == b"models--u--m"
    with pytest.raises(UnsafeFileError, match="leads out"):
        reading.read(snapshot / "stolen")
    (tmp_path / "models--u--m" / "blobs" / "e1").unlink()
    (tmp_path / "models--u--m" / "blobs" / "e1").symlink_to("../../models--u--other/blobs/e1")
    with pytest.raises(UnsafeFileError, match="leads out"):
        reading.read(snapshot / "x")


def test_a_directory_that_the_user_names_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to(TINY)
    assert Checkpoint.open(tmp_path / "link").config == MistralConfig.from_pretrained(TINY)


# Sizes


def test_sizes_are_bounded(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert reading.read(tmp_path / "x", limit=5) == b"12345"
    with pytest.raises(LimitExceededError, match="5 bytes; at most 4"):
        reading.read(tmp_path / "x", limit=4)
    with pytest.raises(LimitExceededError, match="files; at most 1"):
        (tmp_path / "y").write_bytes(b"")
        reading.files_below(tmp_path, most=1)


def test_a_file_without_a_size_is_bounded():
    with pytest.raises(LimitExceededError):  # the system tells 0 bytes
        reading.read(Path("/proc/kallsyms"), limit=1000)


@pytest.mark.parametrize("name", ["a\0b", "absent", "absent/x", "../absent"])
def test_names_that_lead_nowhere(tmp_path, name):
    error = UnsafeFileError if "\0" in name else CheckpointNotFoundError
    with pytest.raises(error):
        reading.read(tmp_path / name)


# One snapshot


def test_a_held_directory_is_read_as_it_was(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / "b" / "y").write_text("b")
    root = held(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "was")
    (tmp_path / "b").rename(tmp_path / "a")
    assert reading.read(root / "x") == b"a"
    assert reading.names(root) == ["x"]
    for ask in (reading.read, Path.exists):  # not that it is not there: nobody knows
        with pytest.raises(CorruptCheckpointError, match="replaced while it was read"):
            type(root).exists(root / "y") if ask is Path.exists else ask(root / "y")
    shutil.rmtree(tmp_path / "was")
    with pytest.raises(CorruptCheckpointError, match="replaced while it was read; load it again"):
        reading.read(root / "x")


def test_a_directory_is_let_go_of(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        reading.names(held(tmp_path) / ".")
    assert len(os.listdir("/proc/self/fd")) <= before + 1


# Nobody else opens files

OPENERS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "fdopen", "fromfile", "memmap", "loadtxt",
    "genfromtxt", "copyfile", "copy2", "copytree", "copyfileobj", "sendfile", "File", "FileIO", "ZipFile", "touch",
}  # fmt: skip
OF_MODULES = {("json", "load"), ("np", "load"), ("numpy", "load"), ("shutil", "copy"), ("shutil", "move"),
              ("pickle", "load"), ("os", "link"), ("os", "symlink"), ("tarfile", "open")}  # fmt: skip
EXCEPTIONS = {
    ("cli/__init__.py", "open"): "os.devnull, in the place of a closed pipe",
    ("cli/repl.py", "open"): "the history of what the user typed, in his own directory",
    ("pictures/page.py", "read_text"): "this package's own page",
    ("text/templates/saved.py", "read_text"): "this package's own template",
    ("weights/containers/hdf5/file.py", "File"): "h5py makes a file of ours in a new directory",
    ("weights/containers/stored_zip.py", "ZipFile"): "over a descriptor that disk opened",
    ("weights/containers/zarr/tree.py", "open"): "tensorstore opens arrays by their path",
}


def openings(source: str) -> set[str]:
    """The calls in a source that open files, by the function's name; those of formats and of tensors do not."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in OPENERS - {"read_bytes", "write_bytes"}:
            found.add(function.id)
        elif isinstance(function, ast.Attribute):
            owner = ast.unparse(function.value)
            ours = function.attr == "open" and (owner in ("Checkpoint", "cls", "family") or "format" in owner)
            ours |= function.attr in ("read_bytes", "write_bytes") and owner in ("self", "tensor_file")
            if (function.attr in OPENERS and not ours) or (owner, function.attr) in OF_MODULES:
                found.add(function.attr)
    return found


def test_only_disk_opens_files():
    found = {
        (path.relative_to(CORE).as_posix(), name)
        for path in CORE.rglob("*.py")
        if path.relative_to(CORE).parts[0] != "disk"
        for name in openings(path.read_text())
    }
    assert found == set(EXCEPTIONS), "open it with disk.reading or disk.files"


@pytest.mark.parametrize(
    "call",
    ["open(p)", "p.open()", "os.open(p, 0)", "p.read_text()", "Path(p).read_bytes()", "json.load(f)", "np.load(p)",
     "np.fromfile(p)", "shutil.copy(a, b)", "h5py.File(p)", "zipfile.ZipFile(p)", "io.open(p)"],
)  # fmt: skip
def test_the_search_finds(call):
    assert openings(call)
    assert not openings("Checkpoint.open(p); formats.format_named(x).open(p, None); reading.opened(p); json.loads(t)")


# One table of limits


OWN_LIMITS = ("pictures/", "text/templates/sandbox/", "weights/containers/hdf5/file.py")
"""What a picture can show; a program of its own, which imports nothing; how an attribute is written."""


def test_limits_stand_in_one_table():
    found = [
        f"{path.relative_to(CORE)}: {ast.unparse(node)}"
        for path in CORE.rglob("*.py")
        if not path.relative_to(CORE).as_posix().startswith(("disk/", *OWN_LIMITS))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]).lstrip("_").startswith(("MAX_", "MOST_", "LIMIT"))
        and not any(name in ast.unparse(node.value) for name in ("limits.", "MAX_"))
    ]
    assert not found, "put it into disk/limits.py, with its unit and reason"


def test_every_limit_has_a_unit_and_a_reason():
    lines = [line for line in Path(limits.__file__).read_text().splitlines() if re.match(r"[A-Z_]+ = ", line)]
    assert len(lines) > 40
    assert not [line for line in lines if "  # " not in line]


def test_a_process_without_descriptors_to_spare_reads_too(monkeypatch):
    def full(descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", full)
    opened = Checkpoint.open(TINY)
    assert opened.read(next(iter(opened.tensors))).size
