"""Every Python example of the README runs, in every framework where it says it does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.mark.parametrize(
    "source",
    [*EXAMPLES, *(SHARED.replace("from mistral_torch", f"from {name}") for name in OTHERS)],
    ids=[*NAMES, "flax shared", "tf shared"],
)
def test_example(source, tmp_path):
    assert output(source, tmp_path)


def test_sampled_text_is_the_same_in_every_framework(tmp_path):
    sources = [GENERATING.replace("from mistral_flax", f"from {name}") for name in ("mistral_torch", *OTHERS)]
    first, *others = [output(source, tmp_path) for source in sources]
    assert "She said" in first
    assert others == [first, first]


def output(source, directory):
    """What an example prints."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_table_of_what_works_where_is_that_of_the_tests():
    assert features.in_readme() == features.table(), "python tests/features.py --write"


def test_the_layout_tree_names_what_is_there():
    root = Path(__file__).parents[1]
    tree = README.partition("## Where things are")[2]
    inside = ""
    found = 0
    for line in re.search(r"```\n(.*?)```", tree, re.DOTALL).group(1).splitlines():
        for name in re.match(r"( *(?:[\w./]+/? {0,2})+?)(?:  |$)", line).group(1).split():
            if not line.startswith(" "):
                inside = name
            path = root / name if not line.startswith(" ") else root / inside / name
            assert path.exists(), path
            found += 1
    assert found > 12
