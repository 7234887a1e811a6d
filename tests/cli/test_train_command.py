"""`mistral train`: what it writes and says, in each framework, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from shallow import first_layer

from mistral_core.cli import main
from mistral_core.cli.train import Teller
from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT

NAMES = ("Emma", "Harriet", "Mr. Knightley", "Miss Bates", "Jane", "Mr. Elton")
FEW = ("--epochs", "2", "--rows", "2", "--length", "64", "--rate", "1e-3")
pytestmark = pytest.mark.lenient_jax("optax's Adam mixes dtypes")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    def chat(name):
        return [{"role": "user", "content": f"Who is {name}?"}, {"role": "assistant", "content": f"{name} is here."}]

    rows = {
        "chat": [{"messages": chat(name)} for name in NAMES],
        "preference": [{"prompt": f"Who is {n}?", "chosen": f" {n} is here.", "rejected": " No."} for n in NAMES],
        "classification": [{"text": f"{name} was here", "label": ["mr", "other"]["Mr" not in name]} for name in NAMES],
        "tokens": [{"tokens": ["Emma", "was", "here"], "labels": ["PER", "O", None]} for _ in NAMES],
        "text": [{"text": f"{name} was here."} for name in NAMES],
    }
    return {kind: write(tmp_path / f"{kind}.jsonl", each) for kind, each in rows.items()}


def trained(capsys, *arguments, model=TINY_CHECKPOINT, status=0):
    assert main(["train", str(model), *arguments]) == status
    return capsys.readouterr()


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A model of one layer: each framework traces, or compiles, every layer of what it trains."""
    return first_layer(str(tmp_path_factory.mktemp("shallow") / "model"))


CASES = {
    "chat": ("--template", "v1", "--lora", "4"),
    "preference": ("--dpo", "--lora", "4", "--lora-targets", "q_proj,v_proj"),
    "classification": (),
    "tokens": ("--lora", "4", "--dora", "--lora-alpha", "4"),
    "text": ("--lora", "4", "--quantization", "int4", "--dtype", "bfloat16", "--gradient-checkpointing"),
}


@pytest.mark.filterwarnings("ignore:.* are initialised")
@pytest.mark.others(kind=("text",))  # what each kind is to a framework, test_training.py has
@pytest.mark.parametrize("kind", CASES)
def test_a_kind_of_examples_is_learnt(backend, shallow, files, tmp_path, capsys, kind):
    name = backend.__name__.removeprefix("mistral_")
    out = tmp_path / "run"
    given = (files[kind], "--out", str(out), "--backend", name, "--validation", files[kind], *FEW, *CASES[kind])
    said = trained(capsys, *given, model=shallow)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    assert f"{steps} steps, all epochs; the record is in {out}" in said.out
    assert f"{out}/best" in said.out
    assert f"{kind}, 6 examples" in said.err
    assert "validation loss" in said.err
    measured = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(measured) == 2
    about = json.loads((out / "run.json").read_text())
    assert about["about"]["model"] == shallow
    assert name in about["made_with"]["backend"] or name in ("tf", "flax")
    architecture = {
        "classification": "MistralForSequenceClassification",
        "tokens": "MistralForTokenClassification",
    }.get(kind, "MistralForCausalLM")
    base = {} if kind == "classification" else {"base": shallow}
    if kind == "tokens":
        base |= {"id2label": {0: "O", 1: "PER"}}
    model = getattr(backend, architecture).from_pretrained(out / "final", **base)
    assert model.config.architectures
    if kind == "classification":
        assert MistralConfig.from_pretrained(out / "final").id2label == {0: "mr", 1: "other"}


def test_what_is_asked_for_is_checked(files, tmp_path, capsys):
    out = ("--out", str(tmp_path / "run"), "--backend", "torch")
    wrong = {
        ("chat", "--lora-alpha", "4"): "lora_alpha: of an adapter; give its rank",
        ("chat", "--dpo"): "--dpo: of an adapter",
        ("chat", "--quantization", "int8"): "packed matrices do not learn",
        ("chat", "--lora", "0"): "r must be a positive integer, got 0",
        ("chat", "--dpo", "--lora", "2", "--template", "v1"): "must have lines with prompt, chosen and rejected",
        ("preference", "--lora", "2"): "or --dpo be given",
        ("text", "--rate", "-1"): "rate must be a number from 0 on",
        ("text", "--patience", "2"): "give --validation",
        ("text", "--beta", "1"): "give --dpo",
        ("text", "--rows", "0"): "rows must be a positive integer",
    }
    for (kind, *given), message in wrong.items():
        assert message in trained(capsys, files[kind], *out, *given, status=2).err, given
    assert not (tmp_path / "run").exists(), "nothing is written where the request is wrong"


def test_a_line_that_is_wrong_is_told_before_anything_is_written(files, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    for line, message in (
        ("no json", "line 2"),
        ('{"text": 3}', "text must be a text"),
        ('{"words": "Emma"}', "must have text as the lines before it"),
    ):
        path.write_text(f'{{"text": "Emma was here."}}\n{line}\n')
        said = trained(capsys, str(path), "--out", str(tmp_path / "run"), "--backend", "torch", status=2)
        assert message in said.err
        assert f"{path}, line 2" in said.err
    assert not (tmp_path / "run").exists()


def test_directories_are_looked_at_first(files, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    said = trained(capsys, files["text"], "--out", str(tmp_path / "full"), "--backend", "torch", status=2)
    assert "must be new" in said.err
    assert "loading" not in said.err, "before the model is read"
    trained(capsys, files["text"], "--out", str(tmp_path / "run"), "--backend", "torch", "--lora", "2", *FEW)
    status = main(["train", str(tmp_path / "run/final"), files["text"], "--out", str(tmp_path / "more")])
    assert status == 2
    assert "an adapter; give its base" in capsys.readouterr().err


def test_progress_tells_speed_and_time_left(capsys, monkeypatch):
    clock = iter([0.0, 2.0, 4.0, 400.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    tell = Teller()
    line = {"epoch": 0, "loss": 1.0, "rate": 1e-4, "tokens": 100, "steps": 10}
    monkeypatch.setattr("mistral_core.cli.train.TOLD_SECONDS", 1.0)
    tell({**line, "step": 1})
    tell({**line, "step": 2})
    tell({**line, "step": 5})
    said = capsys.readouterr().err.splitlines()
    assert "step 1 of 10, epoch 1: loss 1.0000, rate 1.00e-04, 50 tokens/s, 18 s left" in said[0]
    assert "16 s left" in said[1]
    assert "7 min left" in said[2]


COMMAND = ("--rows", "1", "--accumulate", "2", "--length", "64", "--rate", "1e-2", "--epochs", "8", "--save-every", "2")


def command(data, out, backend, *more):
    given = (str(TINY_CHECKPOINT), data, "--out", str(out), "--backend", backend, "--validation", data)
    return ["train", *given, *COMMAND, *more]


def start(data, out, backend, *more):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, "-m", "mistral_core.cli", *command(data, out, backend, *more)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def losses(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("norm"), line.get("validation_loss")) for line in found]


def wait_for(path, lines, process):
    """Until a file has so many lines, or the process is done."""
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.01)


def test_ctrl_c_keeps_the_step_and_resume_goes_on(files, tmp_path):
    assert main(command(files["text"], tmp_path / "whole", "torch", "--lora", "4")) == 0
    process = start(files["text"], tmp_path / "parts", "torch", "--lora", "4")
    wait_for(tmp_path / "parts/metrics.jsonl", 5, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    if process.returncode != 0:  # it may have been done
        assert process.returncode == 130, said
        assert "go on with the same command and --resume" in said
    assert main(command(files["text"], tmp_path / "parts", "torch", "--lora", "4", "--resume")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.sweep
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "all"])
def test_twenty_kills_lose_nothing(backend, files, tmp_path, adapted):
    """kill -9 at 20 random points of a run, which is resumed each time."""
    name = backend.__name__.removeprefix("mistral_")
    more = ("--lora", "4", "--lora-dropout", "0.1", "--epochs", "40") if adapted else ("--epochs", "40")
    whole = start(files["text"], tmp_path / "whole", name, *more)
    assert whole.communicate()[0]
    assert whole.returncode == 0
    rng, kills, wanted = np.random.default_rng(0), 0, len(losses(tmp_path / "whole"))
    for _ in range(20):
        process = start(files["text"], tmp_path / "parts", name, *more, "--resume")
        path = tmp_path / "parts/metrics.jsonl"
        there = path.read_bytes().count(b"\n") if path.exists() else 0
        wait_for(path, min(there + int(rng.integers(1, 8)), wanted - 1), process)
        time.sleep(float(rng.uniform(0, 0.2)))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    last = start(files["text"], tmp_path / "parts", name, *more, "--resume")
    said = last.communicate()[0]
    assert last.returncode == 0, said
    assert kills >= 15
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for folder in ("best", "final"):
        for file in (tmp_path / "whole" / folder).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "parts" / folder / file.name).read_bytes(), f"{folder}/{file.name}"
