"""`conformance.directories` tells a directory that another library runs from one that it does not."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from conformance import directories
from conformance.directories import Cell, Wanted, Written

LOGITS = np.array([0.5, -2.0, 1.0])
WANTED = [Wanted([1, 2, 0], LOGITS), Wanted([1, 1], LOGITS)]
RIGHT = {"tokens:0": [1, 2, 0], "logits:0": LOGITS, "tokens:1": [1, 1], "logits:1": LOGITS}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({}, "2 of 2, 0.0 ulp"),
        ({"tokens:1": [1, 0]}, "1 of 2, 0.0 ulp"),
        ({"tokens:1": [1, 1, 1]}, "1 of 2, 0.0 ulp"),
        ({"logits:1": LOGITS + 1e-4}, "2 of 2, 419.4 ulp"),
        ({"logits:1": LOGITS * np.nan}, "2 of 2, nan ulp"),
        ({"logits:0": np.append(LOGITS, 0)}, "2 of 2, inf ulp"),
        ({"error": "ValueError: no"}, "ValueError: no"),
    ],
)
def test_a_cell_passes_where_all_tokens_and_logits_are_the_reference_s(tmp_path, changed, text):
    np.savez(tmp_path / "0.npz", **(RIGHT | changed))
    assert directories.cell(tmp_path / "0.npz", WANTED) == Cell(text, not changed)


def test_the_table_has_versions_marks_what_is_wrong_and_counts():
    rows = {"convert": [Cell("4 of 4", True), Cell("3 of 4", False)], "save": [None, Cell("4 of 4", True)]}
    assert directories.table(["a 1.0", "b 2.0"], rows).splitlines() == [
        "| written by | a 1.0 | b 2.0 |",
        "|---|---|---|",
        "| convert | 4 of 4 | **3 of 4** |",
        "| save |  | 4 of 4 |",
        "",
        "2 of 3 are right.",
    ]


INTERPRETER = """#!{python}
import json, sys
import numpy as np

*_, command, framework, job, out = sys.argv
with open(job) as file:
    folders = json.load(file)["folders"]
with open(out + "/versions.json", "w") as file:
    json.dump({{"peer": "1.0", framework: "2.0"}}, file)
for key in list(folders)[:{answers}]:
    found = {{f"{{kind}}:{{at}}": value for at in (0, 1) for kind, value in (("tokens", [7]), ("logits", [1.0]))}}
    np.savez(f"{{out}}/{{key}}.npz", **found)
"""


@pytest.mark.parametrize("answers", [1, 2])
def test_each_framework_runs_its_directories_and_one_without_an_answer_is_not_right(
    tmp_path, monkeypatch, capsys, answers
):
    ways = [Written("first", ("torch", "tf"), lambda folder: None), Written("second", ("torch",), lambda folder: None)]
    monkeypatch.setattr(directories, "written", lambda source: iter(ways))
    monkeypatch.setattr(directories, "expected", lambda folder: [Wanted([7], np.array([1.0]))] * 2)
    monkeypatch.setitem(directories.PEERS, "transformers4", ("torch", "tf"))
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable, answers=answers))
    python.chmod(0o700)
    assert directories.main(["--transformers4", str(python)]) == 2 - answers
    second = "2 of 2, 0.0 ulp" if answers == 2 else "**the process ended before it**"
    assert capsys.readouterr().out.splitlines() == [
        "| written by | peer 1.0, torch 2.0 | peer 1.0, tf 2.0 |",
        "|---|---|---|",
        "| first | 2 of 2, 0.0 ulp | 2 of 2, 0.0 ulp |",
        f"| second | {second} |  |",
        "",
        f"{answers + 1} of 3 are right.",
    ]
