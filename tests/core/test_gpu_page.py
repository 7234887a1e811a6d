"""`benchmarks.gpu` on results that are made up: its goals, its page, and what becomes of a part that fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as kit
from benchmarks.gpu import conformance, device, parts
from benchmarks.gpu import page as pages
from benchmarks.gpu.parts import SIZES, Outcome
from conformance.suite import CHECKS

SIZE = SIZES["7b"]
ALL = parts.parts(SIZE)
FACTS = {"torch": "cuda", "jax": "cuda", "name": "a GPU", "memory": 8e10, "versions": {"torch": "2.11.0"}}
ABOUT = {"date": "2026-01-01", "command": "make gpu"}


def part(group, name):
    return next(each for each in ALL if each.group == group and each.name == name)


def outcome(group, name, *rows, problem=""):
    return Outcome(part(group, name), list(rows), problem)


def spoken(step, first=0.1, **more):
    return {"step": step, "first": first, "compile": 30.0, "peak": 15e9, **more}


LIMITS = outcome(
    "limits", "",
    {"what": "read", "way": "sum", "rate": 2e12}, {"what": "read", "way": "copy", "rate": 3e12},
    {"what": "matmul", "way": "torch", "rate": 7e14}, {"what": "jax_limits", "problem": "RuntimeError: no"},
)  # fmt: skip
DECODED = [
    LIMITS,
    outcome("decode", "torch compile=on, batch 1", spoken(0.006, 0.11)),
    outcome("decode", "transformers compile=on, batch 1", spoken(0.008)),
    outcome("decode", "torch compile=off, batch 1", spoken(0.002)),
    outcome("decode", "torch compile=on, batch 8", spoken(0.001)),
]


def test_goals_are_those_of_one_row_and_compiled():
    found = {what: reached for what, _, reached in pages.goals(pages.speeds(DECODED, SIZE))}
    read = found["torch: decode, batch 1, of the memory's limit"]
    matrices = 7.11e9  # numbers that a step reads: all of the 7.25e9 but the embeddings
    assert read == pytest.approx((2 * matrices + 2 * 2 * 1024 * 4128 * 32) / 0.006 / 3e12, rel=0.01)
    assert found["torch: decode, batch 1, times transformers"] == pytest.approx(0.008 / 0.006)
    assert found["torch: prompt, of the matmul rate"] == pytest.approx(2 * 6.98e9 * 4096 / 0.11 / 7e14, rel=0.01)
    assert {found[what] for what in found if what.startswith("flax")} == {None}


def test_a_goal_is_kept_short_or_not_measured():
    assert pages.verdict(0.8, 0.8) == "kept"
    assert pages.verdict(0.8, 0.799) == "short"
    assert pages.verdict(0.8, None) == "not measured"


def test_the_page_has_every_table_and_says_what_is_missing():
    checked = {"subject": ["torch", "flex", "float16"], "check": "blocks", "compared": 9, "failed": []}
    outcomes = [
        *DECODED,
        outcome("decode", "flax, batch 1", problem="stopped after 100 s"),
        outcome("attention", "torch flex", {"implementation": "torch flex", "window": None, "length": 8192,
                                            "seconds": 0.0042, "peak": 2e9}),
        outcome("attention", "jax cudnn", {"implementation": "jax cudnn", "window": 4096, "length": 4096,
                                           "problem": "RuntimeError: no cuDNN"}),
        outcome("packed", "torch compile=on, bfloat16", spoken(0.004)),
        outcome("packed", "torch compile=on, int4", spoken(0.001)),
        outcome("conformance", "torch", {"points": 3}, checked, {**checked, "failed": ["too far"]}),
    ]  # fmt: skip
    text = pages.page(outcomes, SIZE, FACTS, **ABOUT)
    assert "a GPU, 80 GB; torch 2.11.0; 2026-01-01" in text
    assert "| torch: decode, batch 1, times transformers | 1.5 | 1.33 | short |" in text
    assert "| flax: prompt, of the matmul rate | 0.6 |  | not measured |" in text
    assert "| torch flex | none | 8192 | 4.2 | 2 |  |" in text
    assert "| jax cudnn | 4096 | 4096 |  |  | RuntimeError: no cuDNN |" in text
    assert re.search(r"\| torch compile=on, int4 \|.*\| 4 \| 30 \| 15 \|", text)
    assert "| torch | flex | float16 | 2 | 18 | 1 |" in text
    assert "- torch/flex/float16, blocks: too far" in text
    missing = text.partition("## Not measured")[2].split("\n")
    assert [line for line in missing if line] == [
        "- jax_limits: RuntimeError: no",
        "- decode: flax, batch 1: stopped after 100 s",
        "- conformance: torch: 1 of 3 checks were not reached in its time",
    ]


def test_an_empty_run_has_a_page():
    text = pages.page([], SIZE, FACTS, **ABOUT)
    assert text.count("Nothing was measured.") == 4
    assert text.count("not measured |") == 6


def test_the_most_important_parts_come_first_and_fit():
    groups = list(dict.fromkeys(each.group for each in ALL))
    assert groups == ["limits", "conformance", "decode", "attention", "packed"]
    batches = [each.batch for each in ALL if each.group == "decode"]
    assert batches == sorted(batches)
    assert set(batches) == {1, 8, 32}
    assert len({each.title for each in ALL}) == len(ALL)
    assert all(each.limit <= 120 for each in ALL)


def test_one_row_has_the_long_prompt():
    asked = {each.title: parts.asked_of(each, SIZE, "cuda", 60) for each in ALL}
    assert asked["decode: torch compile=on, batch 1"]["prompt"] == 4096
    assert asked["decode: torch compile=on, batch 32"]["prompt"] == 512
    assert asked["packed: torch compile=on, int4"]["prompt"] == 512
    assert asked["packed: torch compile=on, int4"]["sizes"]["num_hidden_layers"] == 8
    assert asked["conformance: torch"]["seconds"] == 60 - parts.ENDS
    assert not asked["conformance: torch"]["quick"]


def child(monkeypatch, code):
    """`parts.run` runs this code in place of the part's module, the same way."""
    start = subprocess.Popen
    monkeypatch.setattr(parts.subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", code], **how))


def test_a_part_that_fails_keeps_what_it_printed(monkeypatch):
    child(monkeypatch, "print('{\"a\": 1}', flush=True); print('{\"b'); raise ValueError('a | b')")
    found = parts.run(ALL[0], {}, 600, "")
    assert found.rows == [{"a": 1}]
    assert found.problem == "ValueError: a / b"
    assert "Traceback" in found.log


class Endless:
    """A process that prints a result and never ends by itself."""

    pid, returncode = 12345, -9

    def __init__(self, command, **how):
        assert how["start_new_session"]

    def communicate(self, timeout=None):
        if timeout is not None:
            raise subprocess.TimeoutExpired("part", timeout)
        return '{"a": 1}\n', "log"


def test_a_part_that_takes_too_long_is_stopped_and_keeps_what_it_printed(monkeypatch):
    killed = []
    monkeypatch.setattr(parts.subprocess, "Popen", Endless)
    monkeypatch.setattr(parts.os, "killpg", lambda group, signal: killed.append(group))
    found = parts.run(ALL[0], {}, 2.0, "")
    assert found[1:3] == ([{"a": 1}], "stopped after 2 s")
    assert found.log == "log"
    assert killed == [Endless.pid]


def test_a_part_sees_the_path_and_not_what_changes_float32(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "brought")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    child(monkeypatch, "import json, os; print(json.dumps(dict(os.environ)))")
    (seen,) = parts.run(ALL[0], {}, 600, "").rows
    assert seen["PYTHONPATH"].split(":") == [str(parts.ROOT), "brought"]
    assert seen["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "NVIDIA_TF32_OVERRIDE" not in seen


def test_a_part_without_time_or_without_its_gpu_is_left_out(monkeypatch):
    monkeypatch.setattr(kit, "run", lambda part, asked, limit, scratch: Outcome(part, [asked], took=limit))
    flax = part("decode", "flax, batch 1")
    left_out = kit.outcome_of(flax, SIZE, {**FACTS, "jax": "cpu"}, 500, 0, "")
    assert left_out == Outcome(flax, [], "its framework sees no GPU")
    assert kit.outcome_of(flax, SIZE, FACTS, parts.LEAST - 1, 0, "").problem == "no time was left"
    assert kit.outcome_of(flax, SIZE, FACTS, 500, 0, "").took == flax.limit
    assert kit.outcome_of(flax, SIZE, FACTS, 500, 250, "").took == 250
    assert kit.outcome_of(flax, SIZE, FACTS, 50, 0, "").took == 50
    nowhere = {**FACTS, "torch": "cpu", "jax": "cpu"}
    assert kit.outcome_of(flax, SIZE, nowhere, 500, 0, "").rows[0]["device"] == "cpu"


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ("Traceback\n  x\nValueError: no\nwarning: bye", "ValueError: no"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "torch.OutOfMemoryError: CUDA out of memory"),
        ("first\nlast | line\n", "last / line"),
        ("", ""),
    ],
)
def test_a_log_is_told_in_a_line(log, wanted):
    assert parts.told(log) == wanted


def test_checks_that_many_compile_for_come_last():
    ranks = {"blocks": 0, "whole tied": 1, "greedy in C": 2, "packed-codes of float32": 2}
    assert {name: conformance.rank(name) for name in ranks} == ranks
    assert set(conformance.FIRST) <= CHECKS.keys()
    assert all(any(name.startswith(each) for name in CHECKS) for each in conformance.LAST)


def test_an_error_fits_into_a_table():
    assert device.problem(ValueError("a | b\n c" + 200 * "d")).startswith("ValueError: a / b cddd")
    assert len(device.problem(ValueError(1000 * "d"))) < 200
    assert json.loads(json.dumps(device.installed()))["numpy"]
