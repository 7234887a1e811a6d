"""What models and files say never reaches a terminal as something that it obeys."""

from __future__ import annotations

import ast
import json
import logging
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from mistral_core import cli, telling
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import CheckpointError, ConfigError, MistralError, TemplateTimeoutError
from mistral_core.text.stream import TextStreamer

EVIL = "\x1b]0;PWN\x07\x9b31m\u202etxt\u2066\x7f\r\x08\u2028\U000e0041"
OBEYED = set(EVIL) - set("]0;PWN31mtxt")

PAINT = re.compile(r"\x1b\[[0-9;]*m")
"""Colours of ours."""


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Stdout as a terminal; returns what was written to both outputs."""
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    return lambda: "".join(capsys.readouterr())


@pytest.fixture
def checkpoint(tmp_path):
    """The embedded checkpoint with a tokenizer, a config and tensors that try."""
    path = tmp_path / "x"
    shutil.copytree(TINY_CHECKPOINT, path)
    (path / "mistral_manifest.json").unlink()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["decoder"]["decoders"].append({"type": "Replace", "pattern": {"String": "e"}, "content": EVIL})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_printable_keeps_line_ends_tabs_and_every_letter():
    text = "a\tb\nc é 日本 👩‍👩‍👧 ا नि"
    assert telling.printable(text) == text
    shown = telling.printable(EVIL + "\ud800")
    assert not OBEYED & set(shown)
    assert shown.encode()
    assert shown.startswith("\\x1b]0;PWN\\x07\\x9b31m\\u202etxt")


@pytest.mark.parametrize("kind", [MistralError, ConfigError, CheckpointError, TemplateTimeoutError])
def test_the_text_of_an_error_is_printable(kind):
    error = kind(f"{EVIL}: wrong")
    assert not OBEYED & set(str(error))
    assert not OBEYED & set(f"{error}")


def test_and_that_of_a_warning():
    with pytest.warns(UserWarning, match="PWN") as caught:
        telling.warn(EVIL)
    assert not OBEYED & set(str(caught[0].message))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "PATH", "Elizabeth was", "--max-new-tokens", "4", "--backend", "torch"],
        ["chat", "PATH", "--max-new-tokens", "4", "--backend", "torch", "--raw"],
        ["tokenize", "PATH", "the bee", "--decode"],
        ["tokenize", "PATH", "the bee"],
        ["tokenize", "PATH", "the bee", "--json"],
        ["mask", "PATH", "the bee"],
        ["info", "PATH"],
        ["demo", "PATH", "--max-new-tokens", "2", "--backend", "torch", "--prompt", EVIL],
        ["verify", "PATH"],
        ["nowhere"],
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_commands(arguments, checkpoint, terminal, monkeypatch):
    pytest.importorskip("torch")
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Elizabeth was"))
    if arguments == ["nowhere"]:
        arguments = ["info", f"/nowhere/{EVIL}"]
    if "--decode" in arguments:
        arguments[2] = "300 301 302 303"
    cli.main([str(checkpoint) if each == "PATH" else each for each in arguments])
    written = PAINT.sub("", terminal())
    assert written
    assert not OBEYED & set(written)


def test_a_pipe_gets_the_text_as_it_is(capsys):
    cli.put(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"


def test_progress_warnings_and_tracebacks(terminal, monkeypatch):
    cli.progress(EVIL)
    logging.getLogger("mistral").info(EVIL)

    def fails(options):
        cli.progress(warnings.formatwarning(UserWarning(EVIL), UserWarning, "x.py", 1))
        raise RuntimeError(EVIL)

    monkeypatch.setattr("mistral_core.cli.info.run", fails)
    assert cli.main(["info", "x"]) == 1
    written = terminal()
    assert "mistral: warning" in written
    assert "RuntimeError" in written
    assert not OBEYED & set(written)


def test_a_streamer_in_a_terminal(terminal):
    TextStreamer(None).on_finalized_text(EVIL, stream_end=True)
    assert not OBEYED & set(terminal())


def test_no_command_prints_by_itself():
    folder = Path(cli.__file__).parent
    for file in sorted(folder.glob("*.py")):
        if file.name == "__init__.py":
            continue
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        names = [n.func.id for n in calls if isinstance(n.func, ast.Name)]
        assert "print" not in names, file.name
