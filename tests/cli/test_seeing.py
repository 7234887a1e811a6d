"""`mistral mask` and `mistral attention`."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.text.tokenizer import MistralTokenizer

PATH = str(TINY_CHECKPOINT)
FRAMEWORKS = {"torch", "jax", "flax", "tensorflow", "keras"}


def out(capsys, *arguments):
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def test_mask_of_a_text(capsys):
    text = out(capsys, "mask", PATH, "Do you have mayonnaise recipes?", "--window", "4")
    assert "layers 0-4: window of 4" in text
    assert " 4 ▁may   w # # # # . ." in text
    assert "\x1b" not in text
    assert "no window" in out(capsys, "mask", PATH, "Emma", "--window", "none")
    assert "layer 3:" in out(capsys, "mask", PATH, "Emma", "--layer", "3")


def test_mask_of_several_texts(capsys):
    texts = ("Emma was", "The evening was not")
    left, right = (out(capsys, "mask", PATH, *texts, "--padding-side", side) for side in ("left", "right"))
    assert "  pad    p p p p p\n  pad" in left
    assert "2 ▁was   # # # p p\n  pad" in right
    assert "3 <s>       d d d # . . . ." in out(capsys, "mask", PATH, *texts, "--packed")


def test_mask_reads_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Emma was\n"))
    assert "2 ▁was" in out(capsys, "mask", PATH)
    monkeypatch.setattr("sys.stdin", io.StringIO("Emma was\n"))
    assert "2 ▁was" in out(capsys, "mask", PATH, "-")


def test_mask_of_chats(capsys, monkeypatch):
    asked = []

    def apply(self, conversation, **options):
        asked.append(conversation)
        return [self.bos_token_id, *self.encode(conversation[0]["content"], add_special_tokens=False)]

    monkeypatch.setattr(MistralTokenizer, "apply_chat_template", apply)
    messages = [{"role": "user", "content": "Emma"}, {"role": "assistant", "content": "was"}]
    out(capsys, "mask", PATH, "--chat", "Emma [1]", "--chat", json.dumps(messages), "--chat", "[1]")
    assert asked == [[{"role": "user", "content": "Emma [1]"}], messages, [{"role": "user", "content": "[1]"}]]


def test_mask_json_is_every_backends(capsys):
    arguments = ("mask", PATH, "Emma was", "The evening was not so", "--window", "3", "--json")
    wanted = json.loads(out(capsys, *arguments))
    for backend in ("torch", "flax", "tf"):
        found = json.loads(out(capsys, *arguments, "--backend", backend))
        assert backend.replace("tf", "tensorflow") in found["title"]
        assert found["panels"] == wanted["panels"], backend


def test_attention_is_every_backends(capsys):
    arguments = ("attention", PATH, "Emma was", "The evening was not so", "--layer", "all", "--head", "all", "--json")
    wanted = json.loads(out(capsys, *arguments, "--backend", "reference"))["panels"]
    assert len(wanted) == 2 * 5 * 6
    for backend in ("torch", "flax", "tf"):
        found = json.loads(out(capsys, *arguments, "--backend", backend))["panels"]
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.abs(np.array(ours.pop("weights")) - theirs["weights"]).max() < 1e-5
            assert ours == {name: value for name, value in theirs.items() if name != "weights"}, backend


def test_attention_in_letters(capsys):
    text = out(capsys, "attention", PATH, "Emma was not", "--backend", "reference")
    assert "layer 4, mean of 6 heads" in text
    assert "0 <s>    #\n1 ▁Emma  # .\n" in text
    grid = out(capsys, "attention", PATH, "Emma was not", "--backend", "reference", "--head", "all", "--layer", "0")
    assert "L0, H0  L0, H1  L0, H2" in grid


def test_attention_takes_the_reference_where_no_framework_is(capsys, monkeypatch):
    monkeypatch.setattr("mistral_core.backend.installed", lambda: iter(()))
    assert "float64 reference" in out(capsys, "attention", PATH, "Emma")


def test_pages_and_images(capsys, tmp_path):
    page, image = tmp_path / "new" / "mask.html", tmp_path / "mask.png"
    assert out(capsys, "mask", PATH, "Emma", "--html", str(page), "--png", str(image)) == ""
    assert page.read_text().startswith("<!doctype html>")
    with Image.open(image) as opened:
        assert opened.format == "PNG"
    arguments = ("attention", PATH, "Emma", "--backend", "reference", "--head", "all")
    out(capsys, *arguments, "--html", str(page), "--png", str(image))
    assert "layer 4, head 5" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mask", PATH, "Emma", "--window", "wide"), "--window"),
        (("mask", PATH, "Emma", "--window", "0"), "sliding_window"),
        (("mask", PATH, "Emma", "--layer", "5"), "0 to 4"),
        (("mask", PATH, "Emma", "--layer", "first"), "0 to 4"),
        (("mask", PATH, "Emma", "--backend", "mxnet"), "not registered"),
        (("mask", PATH, "Emma", "--png", "x.png", "--font", __file__), "font"),
        (("attention", PATH, "Emma", "--backend", "reference", "--head", "9"), "0 to 5"),
        (("mask", "nowhere", "Emma"), "nowhere"),
        (("mask", PATH), "nothing to look at"),
    ],
)
def test_mistakes_are_told(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    assert main([*arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_mask_needs_no_framework():
    code = (
        "import sys; from mistral_core.cli import main; "
        f"main(['mask', {PATH!r}, 'Emma']); print(*{{name.partition('.')[0] for name in sys.modules}})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not FRAMEWORKS & set(run.stdout.splitlines()[-1].split())
