"""Every Python example of the README runs, in every framework where it says it does."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import features
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NAMES = (
    "torch shared",
    "flax generating",
    "transformers",
    "LoRA",
    "cache",
    "NNX",
    "params",
    "Linen",
    "fit",
    "functional",
    "conversations",
    "pipeline",
    "pictures",
    "converting",
    "weights",
)
SHARED, GENERATING = EXAMPLES[:2]
OTHERS = ("mistral_flax", "mistral_tf")


def test_there_are_examples():
    assert len(EXAMPLES) == len(NAMES)
    assert "or mistral_flax, or mistral_tf" in SHARED


CASES = {
    **dict(zip(NAMES, EXAMPLES, strict=True)),
    **{f"{name} shared": SHARED.replace("from mistral_torch", f"from {name}") for name in OTHERS},
    **{
        f"{name} sampled": GENERATING.replace("from mistral_flax", f"from {name}")
        for name in ("mistral_torch", *OTHERS)
    },
}
RUN = """
import contextlib, io, json, os, sys, traceback
for name, directory, source in json.load(sys.stdin):
    os.makedirs(directory)
    os.chdir(directory)
    printed, failed = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([name, printed.getvalue(), failed]), file=sys.__stdout__, flush=True)
"""


@pytest.mark.lenient_jax("an example is what a user runs, and optax's Adam mixes dtypes")
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("sampled")])
def test_example(name):
    assert output(name)


@pytest.mark.lenient_jax("it reads what the examples have printed")
def test_sampled_text_is_the_same_in_every_framework():
    first, *others = [output(f"{name} sampled") for name in ("mistral_torch", *OTHERS)]
    assert "She said" in first
    assert others == [first, first]


def output(name):
    """What an example prints."""
    printed, failed = outputs(framework(CASES[name])).get(name, ("", "its process ended before it"))
    assert not failed, failed
    return printed


def framework(source):
    """The framework that an example imports; those of none, or of several, go with torch's."""
    named = re.search(r"from mistral_(torch|flax|tf)", source)
    return named.group(1) if named else "torch"


@functools.cache
def outputs(name):
    """What each example of a framework prints, and how it failed; all in one process, as importing takes longest."""
    cases = [(case, source) for case, source in CASES.items() if framework(source) == name]
    with tempfile.TemporaryDirectory() as directory:
        jobs = [(case, f"{directory}/{number}", source) for number, (case, source) in enumerate(cases)]
        result = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(jobs),
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    return {case: (printed, failed) for case, printed, failed in map(json.loads, result.stdout.splitlines())}


def test_the_table_of_what_works_where_is_that_of_the_tests():
    assert features.in_readme() == features.table(), "python tests/features.py --write"


def test_the_layout_tree_names_what_is_there():
    root = Path(__file__).parents[1]
    tree = README.partition("## Where things are")[2]
    inside = ""
    found = 0
    for line in re.search(r"```\n(.*?)```", tree, re.DOTALL).group(1).splitlines():
        for name in itertools.takewhile(lambda word: word.endswith(("/", ".py")), line.split()):
            if not line.startswith(" "):
                inside = name
            path = root / name if not line.startswith(" ") else root / inside / name
            assert path.exists(), path
            found += 1
    assert found > 12
