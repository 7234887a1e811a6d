"""The hub against a server on this machine: what is asked for, at which commit, and every way to fail."""

import errno
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import pytest
from huggingface_hub import constants
from local_hub import COMMIT, ENTRY_NOT_FOUND, serving

from mistral_core import TINY, MistralConfig, errors
from mistral_core.config import CONFIG_FILES
from mistral_core.parameters import initial_value, parameters
from mistral_core.weights import hub, manifest
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
    del files[manifest.NAME]
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
        return hub.resolve(repository, cache_dir=tmp_path / "cache", **arguments)

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
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path / "file"), files=["config.json"]) == tmp_path / "file"
    assert hub.resolve(bytes(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/file") == tmp_path / "file"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny-mistral").mkdir(parents=True)
    assert hub.resolve(REPO) == Path(REPO)
    assert not server.requests


@pytest.mark.parametrize("text", ["./a", "../a", "/a/b", "~/absent", "a/b/c", "here/absent", ".hidden"])
def test_absent_paths_are_not_asked_for_on_the_hub(tmp_path, server, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in (text, Path(text)):
        with pytest.raises(errors.CheckpointNotFoundError, match="absent|a|hidden"):
            hub.resolve(path)
    with pytest.raises(errors.CheckpointNotFoundError):
        hub.resolve(Path("someone/absent"))
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


def test_commit_is_resolved_once(server, get):
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


@pytest.mark.parametrize("others", [{"pytorch_model.bin": b""}, {"consolidated.safetensors": b""}, {}])
def test_repository_without_safetensors(server, get, others):
    server.files = {"config.json": b"{}", **others}
    with raises(errors.FileNotOnHubError, "model.safetensors", *others or ["no weights"]):
        get()
    assert downloaded(server) == {"config.json"}


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
        hub.resolve(REPO, cache_dir=tmp_path / "cache")
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
    with raises(errors.OfflineError, "model.safetensors"):
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
    hub.resolve(REPO, cache_dir=tmp_path / "cache", revision=revision, files=CONFIG_FILES)
    assert not list(tmp_path.rglob("evil"))


def test_branch_that_moved_is_followed_online_and_remembered_offline(server, get):
    get()
    server.commit = NEXT
    assert get().name == NEXT
    assert get(local_files_only=True).name == NEXT
    assert get(revision=COMMIT, local_files_only=True).name == COMMIT
