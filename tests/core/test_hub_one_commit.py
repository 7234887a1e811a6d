"""Whatever loads several things of a hub id has them of one commit, though the branch moves on meanwhile."""

from __future__ import annotations

import io
import json

import pytest
from huggingface_hub import constants
from local_hub import COMMIT, serving

from mistral_core import MistralConfig, convert
from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.hub import download
from mistral_core.pictures import AttentionMaskVisualizer, AttentionVisualizer
from mistral_core.pipelines import pipeline
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights import loading

REPO, NEXT = "someone/tiny-mistral", "b" * 40
FILES = {path.name: path.read_bytes() for path in TINY_CHECKPOINT.iterdir() if path.is_file()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub whose branch moves on after each time that somebody asked what it means."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    commits = iter([NEXT, *(f"{number:040x}" for number in range(9))])

    def moves(path):
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            server.asked += 1
            if server.asked > 1:
                server.past[server.commit], server.commit = server.files, next(commits)

    with serving(FILES, (REPO,), monkeypatch) as server:
        server.past, server.asked, server.fault = {COMMIT: FILES}, 0, moves
        yield server


def fetched(server) -> set[str]:
    """The commits that files were fetched of."""
    return {path.split("/")[4] for _, path, _ in server.requests if "/resolve/" in path}


NEW = ("--max-new-tokens", "1")
ENTRIES = {
    "pipeline": lambda path: pipeline(model=REPO, backend="torch"),
    "pipeline and tokenizer": lambda path: pipeline("text-generation", REPO, tokenizer=REPO, backend="torch"),
    "pipeline by model_kwargs": lambda path: pipeline(model=REPO, backend="torch", model_kwargs={"revision": "main"}),
    "generate": lambda path: main(["generate", REPO, "Emma", "--backend", "torch", *NEW]),
    "chat": lambda path: main(["chat", REPO, "--backend", "torch", "--raw", *NEW]),
    "demo": lambda path: main(["demo", REPO, "--backend", "torch", *NEW]),
    "info": lambda path: main(["info", REPO]),
    "tokenize": lambda path: main(["tokenize", REPO, "Emma"]),
    "diff": lambda path: main(["diff", REPO, str(TINY_CHECKPOINT), "--layers", "Emma"]),
    "convert": lambda path: convert(REPO, path / "converted", to="hf"),
    "masks": lambda path: AttentionMaskVisualizer(REPO)("Emma was"),
    "attention": lambda path: AttentionVisualizer(REPO)("Emma was"),
    "attention at a revision": lambda path: AttentionVisualizer(REPO, revision="main")("Emma was"),
    "tokenizer": lambda path: MistralTokenizer.from_pretrained(REPO),
    "checkpoint": lambda path: loading.load_pretrained(REPO, "MistralForCausalLM"),
    "config": lambda path: MistralConfig.from_pretrained(REPO),
}
NEED_TORCH = [entry for entry in ENTRIES if entry.startswith("pipeline")] + ["generate", "chat", "demo"]


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_commit(server, tmp_path, monkeypatch, entry):
    if entry in NEED_TORCH:
        pytest.importorskip("torch")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who was Emma?"))
    ENTRIES[entry](tmp_path)
    assert (fetched(server), server.asked) == ({COMMIT}, 1)


@pytest.mark.parametrize("backend_name", ["torch", "flax", "tf"])
def test_automatic_classes(server, backend_name):
    package = pytest.importorskip(f"mistral_{backend_name}", exc_type=ImportError)
    model = package.AutoModelForCausalLM.from_pretrained(REPO)
    assert fetched(server) == {COMMIT}
    assert model.config.name_or_path == REPO


def test_a_held_id_is_the_branch_for_everybody_else(server):
    """And offline, later, the branch is the commit that was found."""
    held = download.held(REPO)
    assert (held, type(held)) == (REPO, download.HeldId)
    first = MistralTokenizer.from_pretrained(held)
    assert held.commit == COMMIT
    config = MistralConfig.from_pretrained(held, revision="main")
    assert (fetched(server), server.asked) == ({COMMIT}, 1)
    assert download.resolve(REPO, ("config.json",), local_files_only=True).name == COMMIT
    again = MistralConfig.from_pretrained(REPO)
    assert (fetched(server), config) == ({COMMIT, NEXT}, again)
    assert len(first) == json.loads(FILES["config.json"])["vocab_size"]
    assert MistralConfig.from_pretrained(download.held(TINY_CHECKPOINT)) == config
