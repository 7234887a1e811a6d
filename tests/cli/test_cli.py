"""The command line: what it prints, what it returns, what it says of mistakes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from conformance.weights import random_parameters
from mistral_core import backend as registry
from mistral_core import cli
from mistral_core.backend import POLITE
from mistral_core.cli import demo, info, main
from mistral_core.config.presets import TINY
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import MissingExtraError
from mistral_core.weights import checkpoint

PATH = str(TINY_CHECKPOINT)
EAGER = ("--backend", "torch", "--attn-implementation", "eager")
"""What a test checks that is about the text: its length is one for all implementations."""


def random_checkpoint(directory, **changes):
    config = TINY.replace(**changes)
    checkpoint.save(directory, config, random_parameters(config).items())
    return str(directory)


def plant_a_narrow_window(monkeypatch):
    import mistral_torch.step

    right = mistral_torch.step.prepared
    wrong = lambda visibility, name: right(visibility._replace(window=visibility.window - 1), name)  # noqa: E731
    monkeypatch.setattr(mistral_torch.step, "prepared", wrong)


def test_help_names_every_command():
    command = [sys.executable, "-m", "mistral_core.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
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
    plant_a_narrow_window(monkeypatch)
    assert main(["demo", "--backend", "torch", "--backend", "flax", "--max-new-tokens", "100"]) == 1
    *_, told, verdict = capsys.readouterr().out.splitlines()
    assert "DISAGREE" in verdict
    assert told.startswith("torch ")
    assert told.endswith(" ulp from the reference's.")


@pytest.mark.parametrize(("nudged", "agrees"), [(False, True), (True, False)])
def test_demo_wants_the_same_argmax_at_every_position(nudged, agrees):
    tokens, logits = np.array([[0, 1, 2]]), np.eye(4)[None, [1, 2, 2]]
    logits[0, 0, 3] = 1  # a tie inside the prompt, which no written token shows
    found = logits.copy()
    found[0, 0, 3] += 1e-7 if nudged else 0
    model = SimpleNamespace(generate=lambda *_, **__: tokens)
    kind = type("Model", (), {"generate": model.generate, "__call__": lambda *_: SimpleNamespace(logits=found)})
    kind.from_pretrained = classmethod(lambda cls, *_, **__: cls())
    backend = SimpleNamespace(framework="numpy", model_class=lambda _: kind, to_numpy=np.asarray)
    row = demo._framework(
        backend, PATH, demo.Expected(tokens, logits, 2), SimpleNamespace(decode=lambda ids, **_: str(ids))
    )
    assert row.ulp < 2
    assert row.cached_is_one_pass
    assert row.agrees is agrees
    assert row.differs == (() if agrees else ("1 times another likeliest token, first 3 for 1 at position 0",))


@pytest.mark.parametrize(
    ("written", "differs"),
    [
        ([0, 1, 2, 3], ()),
        ([0, 1, 2, 0], ("1 times another token written, first 0 for 3 at position 3", "the cache and one pass give")),
        ([0, 1, 3, 3], ("1 times another token written, first 3 for 2 at position 2", "the cache and one pass give")),
    ],
)
def test_demo_says_where_what_is_written_differs(written, differs):
    expected = demo.Expected(np.array([[0, 1, 2, 3]]), np.eye(4)[None, [1, 2, 3, 0]], 2)
    found = list(demo._differences(np.array([written]), expected.logits, expected, 0.5))
    assert len(found) == len(differs)
    assert all(each.startswith(start) for each, start in zip(found, differs, strict=True))
    far = list(demo._differences(np.array([written]), expected.logits, expected, float("nan")))
    assert "logits nan ulp from the reference's" in far


def test_demo_refuses_a_backend_that_is_not_there(capsys):
    assert main(["demo", "--backend", "torch", "--backend", "mxnet"]) == 2
    assert "mxnet" in capsys.readouterr().err


def test_demo_refuses_lengths_before_it_computes(capsys):
    for count, word in (("-3", "max_new_tokens"), ("5000", "max_position_embeddings")):
        assert main(["demo", "--backend", "torch", "--max-new-tokens", count]) == 2
        assert word in capsys.readouterr().err


def test_info_of_a_checkpoint_and_of_a_published_size(capsys):
    assert main(["info", PATH, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 1_995_664
    assert facts["cache_bytes_at_window"] == facts["cache_bytes_per_token"] * facts["sliding_window"]
    assert facts["stored_as"] == ["BF16"]
    assert main(["info", "mistral-7b-v0.1"]) == 0
    shown = capsys.readouterr().out
    assert "7,241,732,096" in shown
    assert "131,072" in shown
    assert "67,584" in shown  # of the cache, in int8


def test_info_refuses_an_architecture_it_does_not_know(tmp_path, capsys):
    path = random_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("MistralForCausalLM", "LlamaForCausalLM"))
    assert main(["info", path]) == 2
    assert "LlamaForCausalLM" in capsys.readouterr().err


def test_info_of_the_tokenizer(tmp_path):
    path = random_checkpoint(tmp_path)
    assert info.describe(path)["tokenizer"] is None
    assert "tokenizer.json" in info.describe(path)["tokenizer_problem"]
    shutil.copy(TINY_CHECKPOINT / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = info.describe(path)
    assert (found["tokenizer"], found["tokens"]) == ("tokenizer.json", 2048)
    assert (found["instruct_version"], found["chat_templates"]) == ("v1", "default")
    assert "2048 tokens, the model has" in found["tokenizer_problem"]  # fault 114
    (tmp_path / "tekken.json").write_bytes(b"")
    assert "tekken.json" in info.describe(path)["tokenizer_problem"]


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


def test_generate_reads_a_pipe(monkeypatch, capsys):
    read, write = os.pipe()
    with open(write, "w") as pipe:
        pipe.write("Emma was\n")
    with open(read) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert main(["generate", PATH, "--backend", "torch", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Emma was")


def test_check(capsys):
    assert main(["check", "--backend", "torch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["implementation"] for item in found} == {"eager", "sdpa", "blocked", "flex"}
    assert {"logits", "logits cached", "greedy"} <= {item["piece"] for item in found}
    assert all(item["passed"] for item in found)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 1}, {"sliding_window": 2}, {"sliding_window": None, "max_position_embeddings": 64}],
    ids=str,
)
def test_check_fits_narrow_windows_and_short_models(changes, tmp_path):
    assert main(["check", random_checkpoint(tmp_path, **changes), *EAGER]) == 0


@pytest.mark.parametrize("window", [5, 200, 4096])
def test_check_leaves_the_window_however_wide(window, monkeypatch, tmp_path, capsys):
    path = random_checkpoint(tmp_path, sliding_window=window)
    plant_a_narrow_window(monkeypatch)
    assert main(["check", path, *EAGER]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_status_2(capsys):
    assert main(["info", "./nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nowhere" in err
    assert main(["generate", PATH, "x", "--backend", "mxnet"]) == 2
    assert "mxnet" in capsys.readouterr().err


def test_verbose_shows_the_traceback(capsys):
    assert main(["info", "./nowhere", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_generate_without_stdin(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["generate", PATH]) == 2
    assert "prompt" in capsys.readouterr().err


def test_ctrl_c_and_a_closed_pipe(monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(info, "run", interrupted)
        assert main(["info", PATH]) == 130
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mistral_core.cli", "info", PATH]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_the_user_s_choice_of_memory_stays(monkeypatch, capsys):
    for variable in POLITE:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    assert main(["info", PATH]) == 0
    assert {name: os.environ[name] for name in POLITE} == {**POLITE, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def test_a_missing_framework_names_its_extra(monkeypatch):
    class Point:
        name = "torch"

        def load(self):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Point()])
    with pytest.raises(MissingExtraError, match=r"mistral-frameworks\[torch\]"):
        registry.get("torch")
    assert list(registry.installed()) == []


# tokenize


def test_tokenize(capsys, monkeypatch):
    assert main(["tokenize", PATH, "Emma was\n</s>"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["  1  <s>", "790  ▁Emma", "386  ▁was", " 13  \\n"]
    assert "</s>" not in "".join(lines)  # it is text
    assert main(["tokenize", PATH, "Emma</s>", "--json", "--parse-special"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"ids": [1, 790, 2], "tokens": ["<s>", "▁Emma", "</s>"], "text": "Emma"}
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 790]\n"))
    assert main(["tokenize", PATH, "--decode"]) == 0
    assert capsys.readouterr().out.splitlines() == ["  1  <s>", "790  ▁Emma", "Emma"]
    assert main(["tokenize", PATH, "--decode", "one"]) == 2
    assert "must be ids with --decode" in capsys.readouterr().err


def test_tokenize_in_colour(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["tokenize", PATH, "a \x1b[31m"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[97;48;5;18m<s>\x1b[0m" in out
    assert "\x1b[31m" not in out  # what a text says moves no cursor
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["tokenize", PATH, "a"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_commands_of_other_packages_are_entry_points(monkeypatch, capsys):
    """A package registers a command, which is listed and run, and never takes the place of one of ours."""
    module = SimpleNamespace(
        arguments=lambda parser: parser.add_argument("word"), run=lambda options: len(options.word)
    )
    monkeypatch.setitem(sys.modules, "of_another", module)
    points = [
        SimpleNamespace(name=name, load=lambda: cli.Command("what it does", "of_another")) for name in ("other", "info")
    ]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == cli.GROUP else [])
    assert main(["other", "abc"]) == 3
    assert cli.commands()["info"].module == "mistral_core.cli.info"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "what it does" in capsys.readouterr().out
