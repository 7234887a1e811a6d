"""`mistral plan`: what it prints, of what, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from local_hub import serving

from mistral_core import PRESETS
from mistral_core.cli import main
from mistral_core.cli import plan as command
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.plan import plan

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
EXAMPLES = re.findall(r"^    mistral (plan [^\n]*)\n\n```text\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)


def told(capsys, *arguments, status=0):
    assert main(["plan", *arguments]) == status
    return capsys.readouterr().out


def test_the_page_has_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize(("line", "printed"), EXAMPLES, ids=[line for line, _ in EXAMPLES])
def test_an_example_prints_what_the_page_says(line, printed, capsys):
    main(shlex.split(line))
    assert capsys.readouterr().out == printed


def test_a_published_size_in_json_is_the_plan(capsys):
    arguments = ("mistral-nemo-12b-2407", "--mesh", "data=2,tensor=4", "--batch", "4", "--seq", "64", "--json")
    found = json.loads(told(capsys, *arguments, "--optimizer", "adamw", "--lora", "--quantization", "nf4"))
    expected = plan(
        PRESETS["mistral-nemo-12b-2407"], {"data": 2, "tensor": 4}, batch=4, sequence=64, optimizer="adamw", lora=16,
        quantization="nf4",
    )  # fmt: skip
    assert found["bytes"] == expected.bytes
    assert (found["mesh"], found["devices"], found["total"]) == ({"data": 2, "tensor": 4}, 8, expected.total)
    sent = [(row["what"], row["count"], row["bytes"], row["sent"]) for row in found["collectives"]]
    assert sent == [(c.what, c.count, c.nbytes, c.sent) for c in expected.collectives]
    assert found["fits"].keys() == set(command.SHOWN)
    assert all(each["fits"] for each in found["fits"].values())


def test_a_checkpoint_is_planned_in_its_own_dtype_and_length(capsys):
    shown = told(capsys, str(TINY_CHECKPOINT))
    assert "on one device: bfloat16, inference, 1 x 4,096 tokens" in shown
    assert "3,991,328 bytes of a device" in shown
    assert "sends" not in shown
    assert "1 x 4,096" in told(capsys, "mistral-7b-v0.3")
    wide = told(capsys, str(TINY_CHECKPOINT), "--dtype", "fp32", "--seq", "7")
    assert "float32, inference, 1 x 7 tokens" in wide
    assert "7,982,656 bytes" in wide


def test_a_packed_checkpoint_is_planned_as_floats_and_that_is_told(tmp_path, capsys):
    path = str(tmp_path / "packed")
    assert main(["quantize", str(TINY_CHECKPOINT), path, "--scheme", "int8"]) == 0
    capsys.readouterr()
    for arguments, words in (((), "is packed as "), (("--quantization", "int8"), "")):
        assert main(["plan", path, *arguments]) == 0
        found = capsys.readouterr()
        assert ("packed as int8" in found.out) is bool(arguments)
        assert words in found.err
        assert bool(found.err) is not bool(arguments)


def test_of_a_hub_id_the_config_alone_is_fetched(monkeypatch, tmp_path, capsys):
    files = {path.name: path.read_bytes() for path in TINY_CHECKPOINT.iterdir() if path.is_file()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with serving(files, ("some/model",), monkeypatch) as server:
        assert "3,991,328 bytes of a device" in told(capsys, "some/model")
        fetched = {path.rpartition("/")[2] for _, path, _ in server.requests if "/resolve/" in path}
    assert fetched == {"config.json"}


def test_options_change_what_is_told(capsys):
    found = told(
        capsys, "mistral-7b-v0.3", "--lora", "8", "--quantization", "int4", "--group-size", "64", "--remat",
        "--optimizer", "lion", "--batch", "3", "--mesh", "data=2",
    )  # fmt: skip
    assert "data=2, 2 devices: bfloat16, training with lion, 3 x 4,096 tokens, adapters of rank 8" in found
    assert "packed as int4, layers computed again" in found
    assert "data does not divide the batch, so every device computes all of it" in found
    sizes = (told(capsys, "mistral-7b-v0.3", "--quantization", "int4", "--group-size", size) for size in ("64", "32"))
    assert len(set(sizes)) == 2
    assert "cache in int8" in told(capsys, "mistral-7b-v0.3", "--cache-dtype", "int8")
    assert "master weights in float32" in told(
        capsys, "mistral-7b-v0.3", "--master", "fp32", "--optimizer", "sgd"
    )  # fmt: skip


def test_the_status_says_whether_a_named_device_is_large_enough(capsys):
    assert "does not fit on tpu-v5e (16 GB)" in told(capsys, "mistral-7b-v0.3", "--device", "TPU-v5e", status=1)
    assert "fits on 80 GB, 10 % kept free" in told(capsys, "mistral-7b-v0.3", "--device", "80GB")
    assert "does not fit" in told(capsys, "mistral-7b-v0.3")
    told(capsys, "mistral-7b-v0.3", "--device", "h100", "--device", "l4", "--device", "t4", status=1)


def test_the_smallest_mesh_of_each_device(capsys):
    found = told(capsys, "mistral-7b-v0.3", "--suggest", "--optimizer", "adamw", "--remat", "--batch", "8")
    assert [line.partition(" (")[0] for line in found.splitlines()] == list(command.SHOWN)
    as_json = json.loads(told(capsys, "mistral-7b-v0.3", "--suggest", "--device", "t4", "--json"))
    assert as_json["t4"]["mesh"] == {"tensor": 2}
    none = told(capsys, "mistral-large-123b-2411", "--suggest", "--device", "1MB", status=1)
    assert "1 MB, 10 % kept free: nothing up to 1024 devices" in none
    assert json.loads(
        told(capsys, "mistral-large-123b-2411", "--suggest", "--device", "1MB", "--json", status=1)
    ) == {"1MB": None}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mistral-7b-v0.3", "--mesh", "tensor=3"), "tensor may be 1, 2, 4, 8"),
        (("mistral-7b-v0.3", "--mesh", "8"), "write it as data=4,tensor=8"),
        (("mistral-7b-v0.3", "--device", "h9"), "device must be a size such as 80GB"),
        (("mistral-7b-v0.3", "--suggest", "--mesh", "data=2"), "--suggest finds a mesh and must stand without --mesh"),
        (("mistral-7b-v0.3", "--group-size", "64"), "--group-size must stand beside --quantization"),
        (("mistral-7b-v0.3", "--batch", "0"), "batch must be a positive integer"),
        (("mistral-7b-v0.3", "--dtype", "int3"), "dtype must be one of float32"),
        (("./nothing/here",), "nothing/here"),
    ],
    ids=str,
)
def test_mistakes_are_told(arguments, says, capsys):
    assert main(["plan", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_it_loads_no_framework():
    code = "import sys; from mistral_core.cli import main; main(['plan', 'mistral-7b-v0.3']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "jax", "tensorflow", "keras"} & set(out.split())
