"""Pushing against a server on this machine: what is sent, in one commit, and every way to fail."""

import json
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import pytest
from huggingface_hub import constants
from local_hub import COMMITTED, RESET, serving

from mistral_core import TINY, MistralConfig, errors
from mistral_core.cli import push as command
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.disk.into import MANIFEST
from mistral_core.parameters import initial_value, parameters
from mistral_core.weights import manifest, push, sources
from mistral_core.weights.checkpoint import load, save
from mistral_core.weights.push import push_to_hub

# huggingface_hub's own, of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO, TOKEN = "someone/pushed", "hf_SecretSecretSecret"
WEIGHTS = {name: initial_value(name, row, TINY).astype(ml_dtypes.bfloat16) for name, row in parameters(TINY)}
SHARDS = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
OWN = {"config.json", "tokenizer.json", "mistral_manifest.json", "model.safetensors.index.json", *SHARDS}
STEPS = ["/api/repos/create", "/preupload/", "/objects/batch", "/upload/", "/commit/"]


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("push") / "model"
    save(directory, TINY, WEIGHTS.items(), max_shard_size="100KB", other_files={"tokenizer.json": b"{}"})
    return directory


@pytest.fixture
def directory(once, tmp_path) -> Path:
    return shutil.copytree(once, tmp_path / "model")


@pytest.fixture
def server(monkeypatch):
    with serving({}, (), monkeypatch) as server:
        yield server


def failing(status, headers=(), body=b"", *, only=""):
    return lambda path: (status, dict(headers), body) if only in path else None


@contextmanager
def raises(error, *parts):
    """The error, whose message holds the parts, the repository and never the token."""
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error, caught.value
    text = str(caught.value)
    assert all(part in text for part in (REPO, *parts)), text
    assert TOKEN not in text


# What is sent


def test_one_commit_holds_the_checkpoint_and_nothing_else(server, directory):
    for junk in (".env", ".git/config", "run.py", "model.safetensors.lock", "pytorch_model.bin", "optimizer.pt", "a/b"):
        (directory / junk).parent.mkdir(exist_ok=True)
        (directory / junk).write_bytes(b"never sent")
    (directory / "README.md").write_text("# A model")
    (directory / "LICENSE").write_text("free")
    address = push_to_hub(directory, REPO, token=TOKEN)
    assert address == f"{server.url}/{REPO}/commit/{COMMITTED}"
    (commit,) = server.commits
    assert set(commit["files"]) == {*OWN, "README.md", "LICENSE"}
    assert commit["files"] == {name: (directory / name).read_bytes() for name in commit["files"]}
    assert (commit["revision"], commit["message"]) == ("main", "Upload MistralForCausalLM as hf")
    told = {path for _, path, authorization in server.requests if authorization == f"Bearer {TOKEN}"}
    assert {step for step in STEPS if any(step in path for path in told)} == {*STEPS} - {
        "/upload/"
    }  # to a signed address
    assert server.created == [{"name": "pushed", "organization": "someone"}]


def test_what_was_pushed_is_loaded_again(server, directory, tmp_path):
    push_to_hub(directory, REPO)
    snapshot = sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache")
    assert snapshot.name == COMMITTED
    manifest.verify(snapshot)
    config, stream = load(REPO, cache_dir=tmp_path / "cache")
    assert config == MistralConfig.from_pretrained(directory)
    assert {name: array.tobytes() for name, array in stream} == {n: a.tobytes() for n, a in WEIGHTS.items()}


def test_a_manifest_of_more_than_the_checkpoint_lists_what_is_pushed(server, directory, tmp_path):
    (directory / "notes.bin").write_bytes(b"mine")
    manifest.write(directory)
    push_to_hub(directory, REPO)
    listed = json.loads(server.files["mistral_manifest.json"])["files"]
    assert set(listed) == OWN - {"mistral_manifest.json"}
    manifest.verify(sources.resolve_checkpoint(REPO, cache_dir=tmp_path / "cache"))


def test_an_index_of_other_weights_stays_here(server, directory):
    save(directory, TINY, WEIGHTS.items())
    (directory / "flax_model.msgpack.index.json").write_text('{"weight_map": {"a": "flax_model-1.msgpack"}}')
    (directory / "tf_model.h5.index.json").write_text("{")
    push_to_hub(directory / "model.safetensors", REPO)
    assert set(server.files) == {"config.json", "tokenizer.json", "mistral_manifest.json", "model.safetensors"}


def test_an_orbax_directory_goes_as_a_whole(server, tmp_path):
    from mistral_core.weights.convert import convert

    save(tmp_path / "model", TINY, WEIGHTS.items())
    convert(tmp_path / "model", tmp_path / "orbax", to="orbax")
    (tmp_path / "orbax" / "params" / ".hidden").write_bytes(b"never sent")
    push_to_hub(tmp_path / "orbax", REPO)
    expected = {str(p.relative_to(tmp_path / "orbax")) for p in (tmp_path / "orbax").rglob("*") if p.is_file()}
    assert set(server.files) == expected - {"params/.hidden"}
    assert "params/lm_head.weight/.zarray" in server.files


def test_private_message_and_revision(server, directory):
    push_to_hub(directory, REPO, private=True, commit_message="Mine", revision="dev")
    assert server.created[0]["visibility"] == "private"
    assert server.branches == ["dev"]
    assert (server.commits[0]["revision"], server.commits[0]["message"]) == ("dev", "Mine")


def test_a_pull_request(server, directory):
    assert COMMITTED in push_to_hub(directory, REPO, create_pr=True)
    with raises(errors.HubError, "main", "dev"):
        push_to_hub(directory, REPO, create_pr=True, revision="dev")


def test_a_repository_that_is_there_and_weights_that_are_there(server, directory):
    push_to_hub(directory, REPO)
    server.requests.clear()
    push_to_hub(directory, REPO)
    assert len(server.created) == 1
    assert not [path for _, path, _ in server.requests if "/upload/" in path]
    assert len(server.commits) == 2


def test_command(server, directory, capsys):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    command.arguments(parser)
    words = [str(directory), REPO, "--private", "--message", "Mine", "--revision", "dev"]
    assert command.run(parser.parse_args(words)) == 0
    assert capsys.readouterr().out == f"{server.url}/{REPO}/commit/{COMMITTED}\n"
    assert command.run(parser.parse_args([*words, "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == {"commit": f"{server.url}/{REPO}/commit/{COMMITTED}"}
    assert server.created[0]["visibility"] == "private"


# What is not sent


def test_only_checkpoints_are_pushed(server, directory, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(errors.CheckpointNotFoundError):
            push_to_hub(path, REPO)
    (directory / "config.json").write_text("{")
    with pytest.raises(errors.ConfigError):
        push_to_hub(directory, REPO)
    (directory / "config.json").unlink()
    with pytest.raises(errors.CheckpointNotFoundError):
        push_to_hub(directory, REPO)
    assert not server.requests


def test_a_checkpoint_that_is_not_what_its_manifest_says(server, directory):
    file = directory / "model-00001-of-00002.safetensors"
    with file.open("ab") as end:
        end.write(b"x")
    with pytest.raises(errors.CorruptCheckpointError):
        push_to_hub(directory, REPO)
    listed = json.loads((directory / MANIFEST).read_bytes())
    listed["files"]["model-00002-of-00002.safetensors"]["size"] += 1
    (directory / MANIFEST).write_text(json.dumps(listed))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(errors.TruncatedFileError):
        push_to_hub(directory, REPO)
    assert not server.requests


def test_a_file_that_disappears_meanwhile(server, directory):
    def fault(path):
        (directory / "model-00001-of-00002.safetensors").unlink(missing_ok=True) if "/batch" in path else None

    server.fault = fault
    with pytest.raises(errors.MistralError) as caught:
        push_to_hub(directory, REPO, token=TOKEN)
    assert isinstance(caught.value, errors.CheckpointError | errors.HubError)
    assert not server.commits


# Refusals


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("answer", "error", "parts"),
    [
        ((401, {"X-Error-Message": TOKEN}, TOKEN.encode()), errors.AuthRequiredError, ["401", "hf auth login"]),
        ((403, {"X-Error-Message": TOKEN}, TOKEN.encode()), errors.AuthRequiredError, ["403", "token="]),
        ((404, {"X-Error-Code": "RepoNotFound"}), errors.RepoNotFoundError, ["check the id"]),
        ((429, {"Retry-After": "7"}), errors.HubError, ["429", "after 7 s"]),
        ((500, {}), errors.HubError, ["500", "later"]),
        ((503, {"X-Error-Message": TOKEN}), errors.HubError, ["503"]),
    ],
)
def test_124_125_refused_at_every_step(server, directory, step, answer, error, parts):
    server.fault = failing(*answer, only=step)
    with raises(error, *parts) as caught:
        push_to_hub(directory, REPO, token=TOKEN)
    assert caught.value.__cause__ is not None
    assert not server.commits


@pytest.mark.parametrize("status", [409, 412, 413])
def test_a_commit_that_is_in_conflict(server, directory, status):
    server.fault = failing(status, body=b"{}", only="/commit/")
    with raises(errors.HubError, str(status), "later"):
        push_to_hub(directory, REPO)


def test_125_what_passes_is_tried_again_as_late_as_the_hub_asks(server, directory, monkeypatch):
    waits, faults = [], iter([429, 503])
    monkeypatch.setattr("time.sleep", waits.append)

    def fault(path):
        status = next(faults, None) if "/preupload/" in path else None
        return status and (status, {"Retry-After": "7"} if status == 429 else {}, b"")

    server.fault = fault
    assert push_to_hub(directory, REPO)
    assert 7 <= waits[0] <= 10
    assert len(server.commits) == 1


@pytest.mark.parametrize("step", STEPS)
def test_127_a_connection_that_is_reset(server, directory, step):
    server.fault = lambda path: RESET if step in path else None
    with pytest.raises((errors.OfflineError, errors.DownloadCorruptError)) as caught:
        push_to_hub(directory, REPO, token=TOKEN)
    assert REPO in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert not server.commits


def test_126_a_hub_that_says_nothing(server, directory, monkeypatch):
    monkeypatch.setattr(push, "SILENCE_SECONDS", 0.05)
    gate = threading.Event()
    server.fault = lambda path: gate.wait(5) and None
    try:
        with raises(errors.HubTimeoutError, "in time"):
            push_to_hub(directory, REPO)
    finally:
        gate.set()
    from huggingface_hub import get_session

    assert get_session().timeout.read != 0.05


def test_126_a_hub_that_cannot_be_reached(server, directory, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with raises(errors.OfflineError, "network"):
        push_to_hub(directory, REPO)


def test_130_offline(server, directory, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises(errors.OfflineError, "HF_HUB_OFFLINE"):
        push_to_hub(directory, REPO)
    assert not server.requests


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"files": 5}', b'{"objects": 5}'])
@pytest.mark.parametrize("step", STEPS[:3] + STEPS[4:])
def test_answers_that_mean_nothing(server, directory, step, body):
    server.fault = failing(200, {}, body, only=step)
    with raises(errors.HubError):
        push_to_hub(directory, REPO)


@pytest.mark.parametrize("name", ["", "a b/c", "-a/b", "a..b/c", "a/b\u202e", "a\0", "x" * 300, "../../x"])
def test_133_what_cannot_be_an_id(server, directory, name):
    with pytest.raises(errors.RepoNotFoundError):
        push_to_hub(directory, name)
    assert not server.commits


def test_readme_with_metadata_that_the_hub_refuses(server, directory):
    (directory / "README.md").write_text("---\nlicense: x\n---\n")
    server.fault = failing(400, {}, json.dumps({"errors": [{"message": TOKEN}]}).encode(), only="/validate-yaml")
    with raises(errors.HubError, "README.md"):
        push_to_hub(directory, REPO, token=TOKEN)
    assert not server.commits


def test_token_demanded_but_absent(server, directory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with raises(errors.AuthRequiredError, "hf auth login"):
        push_to_hub(directory, REPO, token=True)


def test_a_local_file_without_permission(server, directory, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(directory / "config.json"))

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refused)
    with pytest.raises(errors.CheckpointError, match=r"config.json: cannot be read"):
        push_to_hub(directory, REPO)
    assert os.path.exists(directory)


def test_a_model_is_saved_pushed_and_gone(server):
    kept = []

    def saving(directory):
        kept.append(directory)
        save(directory, TINY, WEIGHTS.items())

    assert COMMITTED in push.save_and_push(saving, REPO, private=True, commit_message="Mine", token=TOKEN)
    assert set(server.files) == {"config.json", "model.safetensors", "mistral_manifest.json"}
    assert server.commits[0]["message"] == "Mine"
    assert not kept[0].parent.exists()


def test_models_of_every_framework_push_what_they_save(backend, server):
    model = backend.MistralForCausalLM.from_pretrained(TINY_CHECKPOINT)
    assert COMMITTED in model.push_to_hub(REPO, private=True, commit_message="Mine", token=TOKEN, max_shard_size="1MB")
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= set(server.files)
    assert server.commits[0]["message"] == "Mine"
