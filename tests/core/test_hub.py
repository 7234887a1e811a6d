"""The hub against a server on this machine: what is asked for, at which commit, and every way to fail."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import pytest
from huggingface_hub import constants
from local_hub import COMMIT, ENTRY_NOT_FOUND, RESET, resolved, serving

from mistral_core import TINY, MistralConfig, convert, errors
from mistral_core.config import CONFIG_FILES
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk.into import MANIFEST
from mistral_core.hub import download
from mistral_core.parameters import initial_value, parameters
from mistral_core.weights import loading, sources
from mistral_core.weights.checkpoint import load, save

REPO, TOKEN = "someone/tiny-mistral", "hf_SecretSecretSecret"
NEXT = "b" * 40


WEIGHTS = {
    name: initial_value(name, row, TINY).astype(ml_dtypes.bfloat16)
    for name, row in parameters(TINY, "MistralForCausalLM")
}


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("repository") / "model"
    save(directory, TINY, WEIGHTS.items(), max_shard_size="100KB", other_files={"tokenizer.json": b"{}"})
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    del files[MANIFEST]
    junk = (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "flax_model.msgpack",
        "run.py",
        "onnx/model.onnx",
    )
    return {**files, **dict.fromkeys(junk, b"never downloaded")}


@pytest.fixture
def server(contents, monkeypatch):
    with serving(contents, (REPO,), monkeypatch) as server:
        yield server


@pytest.fixture
def get(tmp_path, server):
    def get(repository=REPO, **arguments):
        return resolved(repository, cache_dir=tmp_path / "cache", **arguments)

    return get


def downloaded(server) -> set[str]:
    return {path.rpartition("/")[2] for command, path, _ in server.requests if "/resolve/" in path}


def failing(status, headers=(), body=b"", *, only=""):
    return lambda path: (status, dict(headers), body) if only in path else None


@contextmanager
def raises(error, *parts):
    """The error, whose message holds the parts, the repository and never the token."""
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    text = str(caught.value)
    assert all(part in text for part in (REPO, *parts)), text
    assert TOKEN not in text


# Local paths


def test_existing_paths_stay_and_nothing_is_asked(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    assert sources.resolve_checkpoint(tmp_path) == tmp_path
    assert download.resolve(str(tmp_path / "file"), files=["config.json"]) == tmp_path / "file"
    assert sources.resolve_checkpoint(bytes(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources.resolve_checkpoint("~/file") == tmp_path / "file"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny-mistral").mkdir(parents=True)
    assert sources.resolve_checkpoint(REPO) == Path(REPO)
    assert not server.requests


@pytest.mark.parametrize("text", ["./a", "../a", "/a/b", "~/absent", "a/b/c", "here/absent", ".hidden"])
def test_absent_paths_are_not_asked_for_on_the_hub(tmp_path, server, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in (text, Path(text)):
        with pytest.raises(errors.CheckpointNotFoundError, match="absent|a|hidden"):
            sources.resolve_checkpoint(path)
    with pytest.raises(errors.CheckpointNotFoundError):
        sources.resolve_checkpoint(Path("someone/absent"))
    assert not server.requests


# Downloads


def test_model_is_loaded_from_the_hub_and_nothing_else_is_downloaded(tmp_path, server, contents):
    config, stream = load(REPO, cache_dir=tmp_path / "cache")
    assert config.replace(architectures=None, dtype=TINY.dtype) == TINY.replace(architectures=None)
    assert {name: array.tobytes() for name, array in stream} == {n: a.tobytes() for n, a in WEIGHTS.items()}
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert set(contents) >= shards
    assert downloaded(server) == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}


def test_single_file(server, get):
    server.files = {"config.json": b"{}", "model.safetensors": b"x", "model.safetensors.bak": b""}
    snapshot = get()
    assert snapshot.name == COMMIT
    assert {path.name for path in snapshot.iterdir()} == {"config.json", "model.safetensors"}


def test_only_the_files_asked_for_and_one_missing_is_fine(tmp_path, server, get):
    assert {path.name for path in get(files=CONFIG_FILES).iterdir()} == {"config.json"}
    assert MistralConfig.from_pretrained(REPO, cache_dir=tmp_path / "cache").vocab_size == TINY.vocab_size
    with raises(errors.FileNotOnHubError, "absent.json"):
        get(files=["absent.json"])


def test_135_commit_is_resolved_once(server, get):
    class MovesOn(dict):
        def __iter__(self):  # listed: from now on the branch is elsewhere, the commit is not
            server.fault = lambda path: failing(500)(path) if path.startswith("/api") else None
            return super().__iter__()

    server.files = MovesOn(server.files)
    get(revision="main")
    assert [path for _, path, _ in server.requests if path.startswith("/api")] == [f"/api/models/{REPO}/revision/main"]
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in server.requests[1:])


def test_revision_and_token_are_sent(server, get):
    get(revision="v0.1", token=TOKEN, files=CONFIG_FILES)
    assert server.requests[0][1] == f"/api/models/{REPO}/revision/v0.1"
    assert {authorization for _, _, authorization in server.requests} == {f"Bearer {TOKEN}"}


def test_second_time_costs_one_request(server, get):
    first = get()
    server.requests.clear()
    assert get() == first
    assert [command for command, _, _ in server.requests if command == "GET"] == ["GET"]


@pytest.mark.parametrize("others", [{"weights.bin": b""}, {"a.gguf": b"", "b.gguf": b""}, {}])
def test_repository_without_weights_that_are_known(server, get, others):
    server.files = {"config.json": b"{}", **others}
    with raises(errors.FileNotOnHubError, *others or ["no weights"]):
        get()
    assert downloaded(server) == set()


@pytest.mark.parametrize(
    ("format", "files"),
    [
        ("raw", {"params.json", "consolidated.safetensors", "tekken.json"}),
        ("flax-msgpack", {"config.json", "flax_model.msgpack"}),
        ("tf-h5", {"config.json", "tf_model.h5"}),
        ("keras-hub", {"config.json", "metadata.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"}),
        ("orbax", {"config.json", "params/_METADATA", "params/a/.zarray", "params/a/0"}),
        ("maxtext", {"config.json", "0/items/_METADATA", "0/items/a/0"}),
        ("gguf", {"model.gguf"}),
        ("hf-bin", {"config.json", "pytorch_model.bin"}),
        ("raw-pth", {"params.json", "consolidated.00.pth"}),
    ],
)
def test_every_format_is_fetched_and_nothing_beside_it(server, get, format, files):
    server.files = {**dict.fromkeys(files, b"{}"), "notes.txt": b"", "onnx/model.onnx": b"", "some.gguf": b""}
    snapshot = get()
    assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == files
    assert get(format=format) == snapshot
    assert get(local_files_only=True) == snapshot


def test_several_formats(server, get):
    server.files = dict.fromkeys(("config.json", "model.safetensors", "params.json", "consolidated.safetensors"), b"{}")
    get()
    assert downloaded(server) == {"config.json", "model.safetensors", "params.json"}
    get(format="raw")
    assert "consolidated.safetensors" in downloaded(server)
    with raises(errors.ConversionError, "holds hf, raw"):
        get(one_format=True)
    with raises(errors.FileNotOnHubError, "has nothing of the format tf-h5", "consolidated.safetensors"):
        get(format="tf-h5")
    del server.files["model.safetensors"]
    server.files["tf_model.h5"] = b""
    with raises(errors.ConversionError, "holds raw, tf-h5"):
        get()


def test_pickles_are_the_last_choice(server, get):
    server.files = dict.fromkeys(("config.json", "pytorch_model.bin", "flax_model.msgpack"), b"{}")
    get(one_format=True)
    assert downloaded(server) == {"config.json", "flax_model.msgpack"}


def test_one_gguf_of_many(server, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(TINY_CHECKPOINT, tmp_path / "gguf", to="gguf")
    data = (tmp_path / "gguf" / "model.gguf").read_bytes()
    server.files = {"m.Q4.gguf": b"not this", "m.BF16.gguf": data}
    arguments = {"cache_dir": tmp_path / "cache"}
    loaded = loading.load_pretrained(REPO, "MistralForCausalLM", gguf_file="m.BF16.gguf", **arguments)
    assert loaded.config.sliding_window == 80
    assert downloaded(server) == {"m.BF16.gguf"}
    with pytest.raises(errors.UnsafeFileError):
        loading.load_pretrained(REPO, "MistralForCausalLM", gguf_file="../m.gguf", **arguments)


@pytest.mark.parametrize(
    ("shard", "error"),
    [
        ("../../evil.safetensors", errors.UnsafeFileError),
        ("C:\\x.safetensors", errors.UnsafeFileError),
        ("x.bin", errors.UnsafeFileError),
    ],
)
def test_index_cannot_name_other_files(server, get, shard, error):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    server.files = {"config.json": b"{}", "model.safetensors.index.json": index, shard: b"x"}
    with pytest.raises(error):
        get()
    assert downloaded(server) == {"config.json", "model.safetensors.index.json"}


def test_index_naming_an_absent_shard(server, get):
    del server.files["model-00002-of-00002.safetensors"]
    with raises(errors.FileNotOnHubError, "lacks model-00002-of-00002.safetensors"):
        get()


def test_corrupt_download_of_the_right_length_is_noticed_and_removed(server, get, contents):
    name = "model-00002-of-00002.safetensors"
    data = contents[name]
    headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    server.fault = failing(200, headers, bytes(len(data)), only=name)
    with raises(errors.DownloadCorruptError, name, "SHA-256"):
        get()
    server.fault = lambda path: None
    assert (get() / name).read_bytes() == data


def test_connection_that_breaks_off(server, get, contents):
    name = "model-00002-of-00002.safetensors"
    size = {"Content-Length": str(len(contents[name])), "ETag": '"e"', "X-Repo-Commit": COMMIT}
    server.fault = failing(200, size, b"short", only=name)
    with raises(errors.DownloadCorruptError, "broke off"):
        get()


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_127_a_body_that_is_compressed_unasked(server, get, contents, name):
    body = gzip.compress(contents[name])
    headers = {"Content-Encoding": "gzip", "ETag": '"e"', "X-Repo-Commit": COMMIT}
    server.fault = failing(200, headers, body, only=name)
    try:
        snapshot = get()
    except errors.DownloadCorruptError:
        server.fault = lambda path: None
        snapshot = get()
    assert (snapshot / name).read_bytes() == contents[name]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
@pytest.mark.parametrize("change", [-1, 1])
def test_127_a_wrong_content_length(server, get, contents, name, change):
    data = contents[name]
    headers = {"Content-Length": str(len(data) + change), "ETag": '"e"', "X-Repo-Commit": COMMIT}
    server.fault = failing(200, headers, data, only=name)
    with raises(errors.DownloadCorruptError):
        get()
    server.fault = lambda path: None
    assert (get() / name).read_bytes() == data


def test_127_a_connection_that_is_reset(server, get, contents):
    server.fault = lambda path: RESET if "model-00002" in path else None
    with pytest.raises((errors.OfflineError, errors.DownloadCorruptError), match=REPO):
        get()
    server.fault = lambda path: None
    get()


def cached_blob(snapshot: Path, name: str) -> Path:
    return (snapshot / name).resolve()


def test_127_the_whole_file_in_answer_to_a_range(server, get, contents):
    """The server never heeds Range: what is left of an earlier download must not stay in front of it."""
    name = "model-00002-of-00002.safetensors"
    blob = cached_blob(get(), name)
    (blob.parents[1] / "snapshots" / COMMIT / name).unlink()
    blob.unlink()
    blob.with_name(blob.name + ".incomplete").write_bytes(b"left by another process")
    assert (get() / name).read_bytes() == contents[name]


def test_128_a_tampered_cache_is_found_by_the_manifest(server, tmp_path, contents):
    save(tmp_path / "model", TINY, WEIGHTS.items())
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    snapshot = sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache")
    blob = cached_blob(snapshot, "model.safetensors")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    list(load(REPO, cache_dir=tmp_path / "cache")[1])
    with pytest.raises(errors.ChecksumMismatchError, match="model.norm.weight"):
        load(REPO, cache_dir=tmp_path / "cache", verify="full")


def test_128_a_manifest_that_does_not_fit_what_came(server, tmp_path):
    save(tmp_path / "model", TINY, WEIGHTS.items())
    server.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    save(tmp_path / "model", TINY, ((name, array * 2) for name, array in WEIGHTS.items()))
    server.files["model.safetensors"] = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(errors.ChecksumMismatchError):
        load(REPO, cache_dir=tmp_path / "cache", verify="full")


# 129: a cache that is not in order


def damaged(snapshot: Path, kind: str) -> None:
    name = "model-00002-of-00002.safetensors"
    blob, locks = cached_blob(snapshot, name), snapshot.parents[2] / ".locks" / snapshot.parents[1].name
    if kind == "dangling link":
        blob.unlink()
    elif kind == "empty snapshot":
        shutil.rmtree(snapshot)
        snapshot.mkdir()
    elif kind == "no snapshots":
        shutil.rmtree(snapshot.parent)
    elif kind == "no blobs":
        shutil.rmtree(blob.parent)
    elif kind == "ref to a missing commit":
        (snapshot.parents[1] / "refs" / "main").write_text(NEXT)
    elif kind == "ref of garbage":
        (snapshot.parents[1] / "refs" / "main").write_bytes(b"../../..\xff")
    elif kind == "left lock":
        locks.mkdir(parents=True, exist_ok=True)
        (locks / f"{blob.name}.lock").write_bytes(b"4194304")
        blob.unlink()
    elif kind == "left incomplete":
        blob.rename(blob.with_name(blob.name + ".incomplete"))


KINDS = ["dangling link", "empty snapshot", "no snapshots", "no blobs", "ref to a missing commit", "ref of garbage",
         "left lock", "left incomplete"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_129_the_cache_heals_itself(server, get, contents, kind):
    first = get()
    damaged(first, kind)
    again = get()
    assert again == first
    assert all((again / path.name).read_bytes() == contents[path.name] for path in again.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_129_offline_a_damaged_cache_is_whole_or_an_error(server, get, contents, kind):
    damaged(get(), kind)
    try:
        snapshot = get(local_files_only=True)
    except errors.OfflineError:
        return
    assert all((snapshot / path.name).read_bytes() == contents[path.name] for path in snapshot.iterdir())


@pytest.mark.parametrize("what", ["blob", "file"])
def test_129_a_directory_where_a_file_should_be(server, get, what):
    name = "model-00002-of-00002.safetensors"
    snapshot = get()
    path = cached_blob(snapshot, name) if what == "blob" else snapshot / name
    path.unlink()
    if what == "blob":
        (snapshot / name).unlink()
    path.mkdir()
    with pytest.raises((errors.HubError, errors.CheckpointError)) as caught:
        load(REPO, cache_dir=snapshot.parents[2])
    assert "cache" in str(caught.value)


# 131: names out of the listing


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/evil.safetensors", "C:\\evil.safetensors", "a\0.safetensors", "x" * 300 + ".safetensors",
     "CONFIG.JSON", "config.json/evil", "evil\u202e.safetensors", "\x1b[2J.safetensors"],
)  # fmt: skip
def test_131_the_listing_chooses_no_file(server, get, tmp_path, contents, name):
    server.files = {**contents, name: b"evil"}
    snapshot = get()
    assert {path.name for path in snapshot.iterdir()} <= set(contents)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    server.files = {"config.json": b"{}", name: b"evil"}
    with pytest.raises(errors.FileNotOnHubError) as caught:
        get(revision="other")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_131_a_listed_file_cannot_be_asked_for_outside(server, get, tmp_path, name):
    server.files = {name: b"evil"}
    for offline in (False, True):
        with pytest.raises(errors.UnsafeFileError, match=REPO):
            get(files=[name], local_files_only=offline)
    assert not [path for path in tmp_path.rglob("*") if path.name == "evil" and path.is_file()]


# 132, 134: where the cache is, and who else uses it


def test_132_no_symbolic_links(server, get, contents, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    snapshot = get()
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert all(path.read_bytes() == contents[path.name] for path in snapshot.iterdir())


DOWNLOAD = """
import resource, signal, sys, warnings
from mistral_core import errors
from mistral_core.weights import sources
limit = int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(sources.resolve_checkpoint(sys.argv[1], cache_dir=sys.argv[2]))
except errors.MistralError as error:
    print(type(error).__name__, error.errno, error)
"""


def in_another_process(server, cache: Path, *, limit: int = 0) -> subprocess.Popen:
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", DOWNLOAD, REPO, str(cache), str(limit)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_132_a_full_disk(server, tmp_path, contents):
    told, errors_told = in_another_process(server, tmp_path / "cache", limit=30_000).communicate()
    assert told.startswith("HubError"), (told, errors_told)
    assert f"{errno.EFBIG}" in told
    assert "free space" in told
    snapshot = sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache")
    assert all(path.read_bytes() == contents[path.name] for path in snapshot.iterdir())


def test_132_a_read_only_cache(server, tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("os.makedirs", refused)
    with raises(errors.HubError, "cache directory") as caught:
        sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache")
    assert caught.value.errno == errno.EROFS


def test_134_four_processes_download_the_same(server, tmp_path, contents):
    processes = [in_another_process(server, tmp_path / "cache") for _ in range(4)]
    told = [process.communicate() for process in processes]
    snapshot = sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache", local_files_only=True)
    assert {out.strip() for out, _ in told} == {str(snapshot)}, told
    assert all(path.read_bytes() == contents[path.name] for path in snapshot.iterdir())
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


# Refusals


@pytest.mark.parametrize(
    ("answer", "error", "parts"),
    [
        (
            (404, {"X-Error-Code": "RepoNotFound"}),
            errors.RepoNotFoundError,
            ["check the id", "hf auth login"],
        ),
        ((401, {"X-Error-Code": "RepoNotFound"}), errors.RepoNotFoundError, ["private", "hf auth login"]),
        ((401, {}), errors.AuthRequiredError, ["401", "hf auth login"]),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            errors.AuthRequiredError,
            [],
        ),
        ((403, {"X-Error-Code": "GatedRepo"}), errors.AuthRequiredError, ["licence", "hf auth login"]),
        ((403, {"X-Error-Message": TOKEN}, TOKEN.encode()), errors.AuthRequiredError, ["hf auth login"]),
        ((404, {"X-Error-Code": "RevisionNotFound"}), errors.RepoNotFoundError, ["revision"]),
        ((403, {"X-Error-Message": "Access to this resource is disabled."}), errors.HubError, ["disabled"]),
        ((429, {"Retry-After": "7"}), errors.HubError, ["429", "after 7 s"]),
        ((500, {}), errors.HubError, ["500", "later"]),
        ((503, {"X-Error-Message": TOKEN}), errors.HubError, ["503"]),
        ((200, {}, b"<html>login</html>"), errors.HubError, ["cannot be read"]),
        ((200, {}, b'{"id": "x/y", "sha": "../../x", "siblings": []}'), errors.HubError, ["no commit"]),
    ],
)
def test_refused_at_the_door(server, get, answer, error, parts):
    server.fault = failing(*answer, only="/api/")
    with raises(error, *parts) as caught:
        get(token=TOKEN)
    assert caught.value.__cause__ is not None or "no commit" in parts
    assert not downloaded(server)


@pytest.mark.parametrize(
    ("answer", "error", "parts"),
    [
        ((404, ENTRY_NOT_FOUND), errors.FileNotOnHubError, []),
        ((401, {"X-Error-Code": "GatedRepo"}), errors.AuthRequiredError, ["licence"]),
        ((403, {"X-Error-Code": "GatedRepo"}), errors.AuthRequiredError, ["licence"]),
        ((403, {}), errors.AuthRequiredError, ["403"]),
        ((500, {}), errors.HubError, ["500"]),
        ((503, {}), errors.HubError, ["503"]),
    ],
)
def test_refused_at_a_file(server, get, answer, error, parts):
    server.fault = failing(*answer, only="/resolve/")
    with raises(error, *parts):
        get(token=TOKEN)


def test_gated_repository_is_an_auth_error_for_config_too(tmp_path, server):
    server.fault = failing(403, {"X-Error-Code": "GatedRepo"}, only="/resolve/")
    with pytest.raises(PermissionError, match="accept its licence"):
        MistralConfig.from_pretrained(REPO, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["", "a b/c", "-a/b", "a..b/c", "a/b\u202e", "a\0", "x" * 300])
def test_what_cannot_be_an_id(server, get, name):
    with pytest.raises(errors.RepoNotFoundError, match="neither a path here nor a hub id"):
        get(name)
    assert not server.requests


def test_token_demanded_but_absent(get, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with raises(errors.AuthRequiredError, "hf auth login"):
        get(token=True)


def test_hub_that_does_not_answer_in_time(server, get, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    gate = threading.Event()
    server.fault = lambda path: gate.wait(5) and None
    try:
        with raises(errors.HubTimeoutError):
            get()
    finally:
        gate.set()


def unreachable(monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_hub_that_cannot_be_reached(server, get, monkeypatch):
    unreachable(monkeypatch)
    with raises(errors.OfflineError, "network", "HF_ENDPOINT"):
        get()


def test_cache_directory_that_cannot_be_written(tmp_path, server):
    (tmp_path / "cache").write_bytes(b"a file")
    with raises(errors.HubError, "cache directory") as caught:
        sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache")
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)


# Offline


@pytest.fixture(params=["local_files_only", "HF_HUB_OFFLINE"])
def offline(request, monkeypatch):
    def offline():
        if request.param == "HF_HUB_OFFLINE":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            return {}
        return {"local_files_only": True}

    return offline


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_offline_after_a_download(server, get, offline, revision):
    online = get(revision=revision)
    server.requests.clear()
    arguments = offline()
    assert get(revision=revision, **arguments) == online
    assert get(revision=revision, files=CONFIG_FILES, **arguments) == online
    assert not server.requests


def test_offline_with_nothing_names_the_files(server, get, offline):
    with raises(errors.OfflineError, "config.json", "params.json"):
        get(**offline())
    assert not server.requests


def test_offline_with_a_partial_snapshot_lists_what_is_missing(server, get, offline):
    snapshot = get()
    for number in (1, 2):
        os.unlink(snapshot / f"model-0000{number}-of-00002.safetensors")
    with raises(errors.OfflineError, "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors", COMMIT):
        get(**offline())


def test_offline_with_the_config_only(server, get, offline):
    get(files=CONFIG_FILES)
    with raises(errors.OfflineError, "the cache lacks weights"):
        get(**offline())


@pytest.mark.parametrize("fault", ["unreachable", "500"])
def test_silent_hub_leaves_the_cache_with_a_warning(server, get, monkeypatch, fault):
    online = get()
    if fault == "500":
        server.fault = failing(500)
    else:
        unreachable(monkeypatch)
    with pytest.warns(UserWarning, match=f"{REPO}.*copy in the cache, commit {COMMIT}"):
        assert get() == online


@pytest.mark.parametrize("answer", [(404, {"X-Error-Code": "RepoNotFound"}), (403, {"X-Error-Code": "GatedRepo"})])
def test_refusal_does_not_fall_back_to_the_cache(server, get, answer):
    get()
    server.fault = failing(*answer)
    with pytest.raises((errors.RepoNotFoundError, errors.AuthRequiredError)):
        get()


@pytest.mark.parametrize("revision", ["../../evil", "/evil"])
def test_revision_is_no_path(tmp_path, server, revision):
    revision = revision.replace("/evil", f"{tmp_path}/evil") if revision == "/evil" else revision
    download.resolve(REPO, cache_dir=tmp_path / "cache", revision=revision, files=CONFIG_FILES)
    assert not list(tmp_path.rglob("evil"))


def test_branch_that_moved_is_followed_online_and_remembered_offline(server, get):
    get()
    server.commit = NEXT
    assert get().name == NEXT
    assert get(local_files_only=True).name == NEXT
    assert get(revision=COMMIT, local_files_only=True).name == COMMIT
