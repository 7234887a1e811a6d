"""A hub that lies: nothing it says becomes a path, and what it sends has an end, in bytes and in seconds."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download
from local_hub import COMMIT, COMMITTED, resolved, serving

from mistral_core import errors
from mistral_core.disk import limits
from mistral_core.hub import download, wire
from mistral_core.weights.push import push_files

REPO = "someone/m"
FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"numbers" * 20}


@pytest.fixture
def server(monkeypatch):
    with serving(FILES, (REPO,), monkeypatch) as server:
        yield server


@pytest.fixture
def get(tmp_path, server):
    return lambda **arguments: resolved(REPO, cache_dir=tmp_path / "cache", **arguments)


def everything(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def answering(server, only, headers, body=None, status=200):
    """Let the server answer for a file with other headers."""

    def fault(path):
        if path.endswith(only) and "/resolve/" in path:
            return (
                status,
                {"ETag": '"e"', "X-Repo-Commit": COMMIT, **headers},
                FILES.get(only, b"") if body is None else body,
            )
        return None

    server.fault = fault


# Headers


ETAGS = ['"{victim}"', "{victim}", '"../../../../victim"', 'W/"../victim"', '"' + "x" * 5000 + '"', '"a\tb"', '""',
         "..", '"a/b"', '"\\\\host\\x"', '"C:x"', "é"]  # fmt: skip


@pytest.mark.parametrize("etag", ETAGS, ids=range(len(ETAGS)))
@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit", "Content-Disposition"])
def test_no_header_is_a_path(server, get, tmp_path, etag, header):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    answering(server, "config.json", {header: etag.format(victim=victim).encode().decode("latin-1")})
    for _ in range(2):
        assert (get() / "config.json").read_bytes() == FILES["config.json"]
    assert victim.read_text() == "precious"
    assert {path.split("/")[0] for path in everything(tmp_path)} == {"victim", "cache"}
    own = hashlib.sha1(b"blob 8\0" + FILES["config.json"]), hashlib.sha256(FILES["model.safetensors"])
    assert everything(tmp_path / "cache" / "models--someone--m" / "blobs") == {each.hexdigest() for each in own}


@pytest.mark.parametrize(
    "commit", ["../../x", "/etc", "a" * 39, "A" * 40, "a" * 40 + "\n", "g" * 40, "", None, 7, ["a" * 40], "a" * 10**6]
)
def test_a_commit_is_40_digits(server, get, tmp_path, commit):
    told = {"id": REPO, "sha": commit, "siblings": [{"rfilename": "config.json", "size": 8}]}
    server.fault = lambda path: (200, {}, json.dumps(told).encode()) if path.startswith("/api") else None
    with pytest.raises(errors.HubError, match="named no commit"):
        get()
    assert everything(tmp_path) == set()


@pytest.mark.parametrize(
    "answer",
    [b"[]", b"7", b"null", b'{"sha": 1', b"[" * 10**6, b'{"sha": "%s", "siblings": 7}' % (b"a" * 40), b"\xff"],
    ids=range(7),
)
def test_an_answer_that_is_none(server, get, answer):
    server.fault = lambda path: (200, {}, answer) if path.startswith("/api") else None
    with pytest.raises(errors.HubError):
        get()


@pytest.mark.parametrize(
    "entry",
    [7, None, {}, {"rfilename": 7}, {"rfilename": "a", "size": -1}, {"rfilename": "a", "size": True},
     {"rfilename": "a", "lfs": {"sha256": "../../x", "size": 1}}, {"rfilename": "a", "size": 10**30},
     {"rfilename": "a/" * 10_000}],
)  # fmt: skip
def test_entries_that_are_none_are_left_out(server, get, entry):
    told = {"sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": 8}, entry]}
    server.fault = lambda path: (200, {}, json.dumps(told).encode()) if path.startswith("/api") else None
    assert (get(files=["config.json"]) / "config.json").read_bytes() == FILES["config.json"]


def test_names_that_differ_in_case_only_are_refused(server, get):
    server.files = {"config.json": b"{}", "params/_METADATA": b"{}", "params/A/0": b"1", "params/a/0": b"2"}
    with pytest.raises(errors.UnsafeFileError, match="nothing but case"):
        get(format="orbax")


def test_the_number_of_files_is_bounded(server, get, monkeypatch):
    monkeypatch.setattr(limits, "FILES", 1)
    with pytest.raises(errors.HubError, match="2 files of a repository; at most 1"):
        get()


# Redirects


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x", "", "//", "http://user:word@127.0.0.1/x",
     "http://[::1", "http://127.0.0.1:0/x", "x" * 20_000],
    ids=range(10),
)  # fmt: skip
def test_redirects_elsewhere_are_refused(server, get, tmp_path, location):
    answering(server, "config.json", {"Location": location}, b"", 302)
    with pytest.raises(errors.HubError, match="redirects"):
        get()
    assert not list(tmp_path.rglob("config.json"))


def test_redirects_have_an_end(server, get):
    answering(server, "config.json", {"Location": f"/{REPO}/resolve/{COMMIT}/config.json"}, b"", 307)
    with pytest.raises(errors.HubError, match="redirects more than"):
        get()


def test_a_token_goes_to_no_other_host(server, get, monkeypatch):
    with serving(FILES, (REPO,), monkeypatch) as other:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        answering(server, "config.json", {"Location": f"{other.url}/{REPO}/resolve/{COMMIT}/config.json"}, b"", 302)
        assert (get(token="hf_secret") / "config.json").read_bytes() == FILES["config.json"]
        assert other.requests
        assert {authorization for *_, authorization in other.requests} == {None}
        assert {authorization for *_, authorization in server.requests} == {"Bearer hf_secret"}


# Ends


@pytest.mark.parametrize("name", FILES)
def test_no_more_is_taken_than_was_announced(server, get, tmp_path, name):
    answering(server, name, {"Content-Length": "10000000"}, bytes(10_000_000))
    with pytest.raises(errors.DownloadCorruptError, match=f"{name} (has|goes on after)"):
        get()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1000


def test_a_file_whose_size_nobody_told_is_bounded(server, get, monkeypatch):
    told = {"sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
    server.fault = lambda path: (200, {}, json.dumps(told).encode()) if path.startswith("/api") else None
    get(files=["config.json"])
    monkeypatch.setattr(limits, "UNANNOUNCED_BYTES", 7)
    with pytest.raises(errors.DownloadCorruptError, match="goes on after the 7 bytes"):
        download.resolve(REPO, files=["config.json"], cache_dir=os.path.join(constants.HF_HUB_CACHE, "absent"))


def test_answers_are_bounded(server, get, monkeypatch):
    monkeypatch.setattr(limits, "API_BYTES", 50)
    with pytest.raises(errors.LimitExceededError, match="more than 50 bytes"):
        get()


class Slow:
    """An answer of which a byte comes a second, by the clock that the wire reads."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(wire.time, "monotonic", lambda: self.now)

    def iter_raw(self):
        for _ in range(10_000):
            self.now += 1
            yield b"x"


def test_a_trickle_has_an_end(monkeypatch):
    slow = Slow(monkeypatch)
    with pytest.raises(errors.HubTimeoutError, match="less than 1024 bytes a second"):
        list(wire._arriving(slow, download.Repository(REPO, None, None, None), 10**6))
    assert slow.now <= limits.SLOW_SECONDS + 1


def test_a_head_that_never_comes_has_an_end(monkeypatch):
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.05)
    gate = wire.threading.Event()
    with pytest.raises(errors.HubTimeoutError, match="did not answer"):
        wire._in_time(lambda: gate.wait() and io.BytesIO(), download.Repository(REPO, None, None, None))
    gate.set()


# What was compared


KILLED = """
import os, sys
from mistral_core.hub import download
def check(path, *rest):
    os.kill(os.getpid(), 9)
download._check = check
download.resolve(sys.argv[1], cache_dir=sys.argv[2], files=["model.safetensors"])
"""


@pytest.mark.parametrize("corrupt", [True, False])
def test_a_download_that_nobody_compared_is_not_in_the_cache(server, get, tmp_path, corrupt):
    sent = FILES["model.safetensors"]
    bad = bytes(len(sent))
    answering(server, "model.safetensors", {}, bad if corrupt else sent)
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    child = subprocess.run([sys.executable, "-c", KILLED, REPO, str(tmp_path / "cache")], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(errors.OfflineError):
        get(files=["model.safetensors"], local_files_only=True)
    server.fault = lambda path: (500, {}, b"") if "/resolve/" in path else None  # it need not be sent again
    if corrupt:
        with pytest.raises(errors.DownloadCorruptError, match="was removed, load again"):
            get(files=["model.safetensors"])
        server.fault = lambda path: None
    assert (get(files=["model.safetensors"]) / "model.safetensors").read_bytes() == sent


def of_huggingface(server, tmp_path: Path, name: str) -> Path:
    return Path(hf_hub_download(REPO, name, revision=COMMIT, cache_dir=tmp_path / "cache", endpoint=server.url))


def test_a_cache_of_huggingface_hub_is_used(server, get, tmp_path):
    path = of_huggingface(server, tmp_path, "model.safetensors")
    server.requests.clear()
    assert get(revision=COMMIT, files=["model.safetensors"]) / "model.safetensors" == path
    assert not [each for each in server.requests if "/resolve/" in each[1]]
    assert get(revision=COMMIT, files=["model.safetensors"], local_files_only=True) / "model.safetensors" == path


def test_our_cache_is_used_by_huggingface_hub(server, get, tmp_path):
    path = get(revision=COMMIT) / "model.safetensors"
    before = everything(tmp_path)
    assert of_huggingface(server, tmp_path, "model.safetensors") == path
    assert {name for name in everything(tmp_path) - before if "/.locks" not in name} <= {"cache/.locks"}


@pytest.mark.parametrize("offline", [True, False])
def test_what_others_put_into_the_cache_is_compared_once(server, get, tmp_path, offline):
    path = of_huggingface(server, tmp_path, "model.safetensors")
    path.resolve().write_bytes(bytes(len(FILES["model.safetensors"])))
    with pytest.raises(errors.DownloadCorruptError):
        get(revision=COMMIT, files=["model.safetensors"], local_files_only=offline)
    assert not path.exists()
    assert (get(revision=COMMIT, files=["model.safetensors"]) / "model.safetensors").read_bytes() == FILES[
        "model.safetensors"
    ]


def test_the_same_bytes_of_another_commit_are_not_sent_again(server, get):
    get()
    server.commit = "b" * 40
    server.requests.clear()
    assert (get() / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [command for command, path, _ in server.requests if path.endswith("model.safetensors")] == ["HEAD"]


def test_a_link_out_of_the_cache_is_no_file_of_it(server, get, tmp_path):
    snapshot = get()
    (tmp_path / "secret").write_bytes(b"secret")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../../secret")
    for offline in (True, False):
        with pytest.raises(errors.UnsafeFileError, match="leads out"):
            get(files=["config.json"], local_files_only=offline)
    assert (tmp_path / "secret").read_bytes() == b"secret"


# What a hub answers to an upload


@pytest.fixture
def push(server, tmp_path):
    server.files, server.repositories = {}, ()
    return lambda: push_files({"config.json": b"{}"}, REPO, "message", token="hf_x")


def test_an_upload_s_address_is_the_hub_s(server, push):
    assert push() == f"{server.url}/{REPO}/commit/{COMMITTED}"


@pytest.mark.parametrize("url", ["javascript:alert(1)", "\x1b[2J", "http://elsewhere/x", "x" * 5000, 7])
def test_an_address_that_is_none_is_not_told(server, push, url):
    told = {"commitUrl": url, "commitOid": COMMITTED}
    server.fault = lambda path: (200, {}, json.dumps(told).encode()) if "/commit/" in path else None
    try:
        assert push() == f"{server.url}/{REPO}"
    except errors.HubError as error:
        assert "cannot be read" in str(error) or "upload failed" in str(error)  # noqa: PT017


def test_another_repository_is_not_written_to(server, push):
    told = json.dumps({"url": f"{server.url}/attacker/other"}).encode()
    server.fault = lambda path: (200, {}, told) if path == "/api/repos/create" else None
    with pytest.raises(errors.HubError, match="another repository, 'attacker/other'"):
        push()
    assert not server.commits


@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/", "/preupload/"])
def test_answers_to_an_upload_are_bounded(server, push, monkeypatch, path):
    monkeypatch.setattr(limits, "API_BYTES", 1000)
    server.fault = lambda asked: (200, {}, b" " * 2000) if path in asked else None
    with pytest.raises(errors.LimitExceededError, match="more than 1000 bytes"):
        push()
