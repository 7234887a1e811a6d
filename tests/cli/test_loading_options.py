"""Every command that loads a model takes a dtype, a device and an attention implementation, in both spellings."""

from __future__ import annotations

import io
import sys

import pytest

from mistral_core import cli
from mistral_core.data import TINY_CHECKPOINT

LOADING = ("generate", "chat", "attention", "demo", "check")
GIVEN = ("--torch_dtype", "auto", "--device", "0", "--attn_implementation", "flash_attention_2")


@pytest.mark.parametrize("command", LOADING)
@pytest.mark.parametrize("spelling", [str, lambda name: name.replace("_", "-")])
def test_they_are_there(command, spelling):
    given = [spelling(each) if each.startswith("--") else each for each in GIVEN]
    options = cli._options([command, "x", *given])
    assert cli.loading(options) == {"dtype": "auto", "device": "0", "attn_implementation": "flash_attention_2"}


@pytest.fixture
def chat(monkeypatch, capsys):
    """`echo ... | mistral chat`, with some options: its status and both outputs."""
    pytest.importorskip("torch")

    def run(*options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Elizabeth was\n"))
        status = cli.main(["chat", str(TINY_CHECKPOINT), "--max-new-tokens", "2", "--backend", "pt", *options])
        return status, capsys.readouterr()

    return run


def test_the_command_line_of_transformers_documentation(chat):
    status, said = chat("--torch_dtype", "auto", "--device", "-1", "--attn_implementation", "sdpa")
    assert status == 0
    assert said.out.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "77"), "device: '77' is not here; torch sees cpu"),
        (("--device", "nowhere at all"), "a number, a name such as"),
        (
            ("--attn_implementation", "fastest"),
            "attn_implementation must be one of eager, sdpa, blocked, flex, flash_attention_2, got 'fastest'.",
        ),
        (("--torch_dtype", "int3"), "dtype must be one of"),
    ],
)
def test_what_is_not_here_is_told(chat, options, message):
    status, said = chat(*options)
    assert status == 2
    assert message in said.err


def test_flash_attention_without_its_package_is_told(chat, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "flash_attn" else real(name, *a))
    status, said = chat("--attn_implementation", "flash_attention_2")
    assert status == 2
    assert "needs the package flash-attn" in said.err


def test_demo_and_check_compare_what_they_can(capsys):
    assert cli.main(["demo", "--dtype", "bfloat16", "--backend", "torch"]) == 2
    assert "mistral check --dtype" in capsys.readouterr().err
    assert cli.main(["check", "--device", "0", "--backend", "torch"]) == 2
    assert "computed on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "attention"])
def test_the_help_tells_the_default_that_is_used(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "torch, flax, tf; default: the first of them that is installed" in said
