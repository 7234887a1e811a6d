"""The command line: what it prints, what it returns, what it says of mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mistral_core import backend as registry
from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import MissingExtraError

PATH = str(TINY_CHECKPOINT)


def run(*arguments, stdin=None):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "mistral_core.cli", *arguments]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, check=False)


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("demo", "info", "generate", "check"))


def test_demo(capsys):
    assert main(["demo", "--json", "--max-new-tokens", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["agree"]
    assert len(report["frameworks"]) == 4
    assert len({row["text"] for row in report["frameworks"]}) == 1
    assert all(row["argmax"] == 1 and row["cached_is_one_pass"] for row in report["frameworks"])
    assert all(0 < row["ulp"] <= 32 for row in report["frameworks"][1:])


def test_demo_prints_text_and_table(capsys):
    assert main(["demo", "--backend", "torch", "--max-new-tokens", "8", "--prompt", "Emma was"]) == 0
    out = capsys.readouterr().out
    assert "prompt: Emma was" in out
    assert "wrote the same" in out
    assert "all agree" in out


def test_demo_fails_where_a_framework_disagrees(monkeypatch, capsys):
    import mistral_torch.layers

    right = mistral_torch.layers.attention_mask
    wrong = lambda q, k, window, **more: right(q, k, window - 1, **more)  # noqa: E731
    monkeypatch.setattr(mistral_torch.layers, "attention_mask", wrong)
    assert main(["demo", "--backend", "torch"]) == 1
    assert "DISAGREE" in capsys.readouterr().out


def test_info_of_a_checkpoint_and_of_a_published_size(capsys):
    assert main(["info", PATH, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 1_995_664
    assert facts["cache_bytes_at_window"] == facts["cache_bytes_per_token"] * facts["sliding_window"]
    assert facts["stored_as"] == ["BF16"]
    assert main(["info", "mistral-7b-v0.1"]) == 0
    assert "7,241,732,096" in capsys.readouterr().out


def test_info_loads_no_framework():
    code = f"import sys; from mistral_core.cli import main; main(['info', {PATH!r}]); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "jax", "tensorflow", "keras"} & set(out.split())


@pytest.mark.parametrize("backend", ["torch", "flax", "tf"])
def test_generate(backend, capsys):
    assert main(["generate", PATH, "Emma was", "--backend", backend, "--max-new-tokens", "5", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["text"].startswith("Emma was not at all")
    assert out["new_tokens"] == 5


def test_generate_reads_a_pipe():
    result = run("generate", PATH, "--backend", "torch", "--max-new-tokens", "3", stdin="Emma was\n")
    assert result.returncode == 0
    assert result.stdout.startswith("Emma was")


def test_check(capsys):
    assert main(["check", "--backend", "torch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["implementation"] for item in found} == {"eager", "sdpa"}
    assert {"logits", "logits cached", "greedy"} <= {item["piece"] for item in found}
    assert all(item["passed"] for item in found)


def test_errors_are_one_line_and_exit_status_2(capsys):
    assert main(["info", "./nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nowhere" in err
    assert main(["generate", PATH, "x", "--backend", "mxnet"]) == 2
    assert "mxnet" in capsys.readouterr().err


def test_a_missing_framework_names_its_extra(monkeypatch):
    class Point:
        name = "torch"

        def load(self):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Point()])
    with pytest.raises(MissingExtraError, match=r"mistral-frameworks\[torch\]"):
        registry.get("torch")
    assert list(registry.installed()) == []
