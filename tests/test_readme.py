"""Every example of the README, of docs/ and of examples/ runs, in every framework where it says it does.

What an example prints stands in the ```text block after it, or after "Prints:" in the docstring of a script, and is
compared; three dots stand for anything.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

import cli_page
import features
import numpy as np
import pictures_page
import pytest
from PIL import Image
from shallow import first_layer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
SCRIPTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("examples/*.py"))}
WITHOUT = ("docs/cli.md", "docs/clients.md", "docs/limits.md", "docs/proof.md", "docs/launchers/ray.md")
"""Pages without an example that runs with what is installed here."""
TYPED = {"examples/chat.py": "Emma was\nMr. Knightley said\n"}
"""What is typed into a script."""
FRAMEWORKS = ("torch", "flax", "tf")


class Case(NamedTuple):
    """An example, the framework that it runs in, what is typed and what it prints."""

    source: str
    framework: str
    printed: str
    typed: str = ""


def in_page(name: str, text: str) -> dict[str, Case]:
    """The examples of a page; one that is said to run in any framework is a case for each."""
    found = {}
    for number, match in enumerate(re.finditer(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.DOTALL), 1):
        source, printed = match[1], match[2] or ""
        first = framework(source)
        others = [other for other in FRAMEWORKS if f"or mistral_{other}" in source or f'or "{other}"' in source]
        for other in (first, *others):
            changed = source.replace(f"from mistral_{first}", f"from mistral_{other}")
            changed = changed.replace(f'backend="{first}"', f'backend="{other}"')
            found[f"{name} {number} {other}"] = Case(changed, other, printed)
    return found


def in_script(name: str, text: str) -> Case:
    """A script, and what its docstring says that it prints."""
    printed = (ast.get_docstring(ast.parse(text)) or "").partition("Prints:\n")[2]
    return Case(text, framework(text), textwrap.dedent(printed).strip("\n"), TYPED.get(name, ""))


def framework(source: str) -> str:
    """The framework that an example imports or names; those of none, or of several, go with torch's."""
    named = re.search(r"from mistral_(torch|flax|tf)|backend=\"(torch|flax|tf)\"", source)
    return named[1] or named[2] if named else "torch"


CASES = {
    **{key: case for name, text in PAGES.items() for key, case in in_page(name, text).items()},
    **{name: in_script(name, text) for name, text in SCRIPTS.items()},
}
SHALLOW = (
    "docs/jax.md 2 flax", "docs/jax.md 4 flax", "docs/keras.md 2 tf", "docs/launchers/jax-distributed.md 1 flax",
    "docs/launchers/tf-distribute.md 1 tf", "docs/learning.md 3 flax", "docs/learning.md 3 tf",
    "docs/learning.md 4 flax", "docs/learning.md 4 tf", "examples/fit_keras.py", "examples/mirrored_keras.py",
    "examples/train_step_jax.py",
)  # fmt: skip
"""Examples of training, prediction and export, which trace each layer: they get the checkpoint's first one only."""
ALONE = ("examples/shard_jax.py", "examples/mirrored_keras.py")
"""Examples that say how many devices there are, before a framework looks: each has a process of its own."""
RUN = """
import contextlib, io, json, os, sys, traceback
import mistral_core.data
whole = mistral_core.data.TINY_CHECKPOINT
for name, directory, source, typed, checkpoint in json.load(sys.stdin):
    os.makedirs(directory)
    os.chdir(directory)
    mistral_core.data.TINY_CHECKPOINT = checkpoint or whole
    if not name.startswith("README") and "mistral_tf.generate" in sys.modules:
        # steps are traced as the README's have been, and not compiled by XLA, which takes as long again
        sys.modules["mistral_tf.generate"]._is_float32_on_cpu = lambda model: False
    printed, failed, sys.stdin = io.StringIO(), "", io.StringIO(typed)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed = traceback.format_exc()
    print(json.dumps([name, printed.getvalue(), failed]), file=sys.__stdout__, flush=True)
"""


def test_there_are_examples():
    assert len(PAGES) > 10
    assert len(SCRIPTS) >= 7
    assert {case.framework for case in CASES.values()} == set(FRAMEWORKS)
    for name in PAGES:
        if name not in WITHOUT:
            assert any(key.startswith(name) for key in CASES), name
    assert sum(key.startswith("README.md 1 ") for key in CASES) == 3
    assert {*SHALLOW, *ALONE} <= set(CASES)


of_a_user = pytest.mark.lenient_jax("an example is what a user runs, and optax's Adam mixes dtypes")


@of_a_user
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(case.framework)) for name, case in CASES.items()]
)
def test_example(name):
    assert_printed(name, outputs(CASES[name].framework, alone=name if name in ALONE else ""))


@of_a_user
@pytest.mark.slow
@pytest.mark.parametrize("name", SHALLOW)
def test_an_example_with_all_layers(name):
    assert_printed(name, outputs(CASES[name].framework, whole=True, alone=name if name in ALONE else ""))


def assert_printed(name, found):
    """What an example printed is what its page says."""
    printed, failed = found.get(name, ("", "its process ended before it"))
    assert not failed, failed
    said, expected = (_without_blanks(text) for text in (printed, CASES[name].printed))
    assert re.fullmatch(re.escape(expected).replace(r"\.\.\.", ".*"), said, re.DOTALL), printed


def _without_blanks(text: str) -> str:
    """The text without blanks at the ends of lines, which editors take away."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@functools.cache
def outputs(name: str, *, whole: bool = False, alone: str = "") -> dict[str, tuple[str, str]]:
    """What each example of a framework prints, and how it failed; all in one process, as importing takes longest.

    `whole` runs those of SHALLOW alone, with all layers; `alone` is the only example that runs.
    """
    with tempfile.TemporaryDirectory() as directory:
        first = "" if name == "torch" or whole else first_layer(f"{directory}/first")
        chosen = [alone] if alone else [key for key in CASES if key not in ALONE and (key in SHALLOW or not whole)]
        cases = [(key, CASES[key]) for key in chosen if CASES[key].framework == name]
        jobs = [
            (key, f"{directory}/{n}", case.source, case.typed, first if key in SHALLOW else "")
            for n, (key, case) in enumerate(cases)
        ]
        result = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(jobs),
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    return {key: (printed, failed) for key, printed, failed in map(json.loads, result.stdout.splitlines())}


def indented(text: str) -> list[str]:
    """The lines of a page's indented blocks, without what a comment says."""
    return [line.strip().partition("  #")[0] for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_such_that_the_command_line_takes_them(name):
    from mistral_core import cli

    text = re.sub(r"```.*?```", "", PAGES[name].partition(cli_page.BEGIN)[0], flags=re.DOTALL)
    lines = [line for line in indented(text) if "mistral " in line and "import" not in line]
    for command in itertools.chain.from_iterable(line.replace("|", ";").split("; ") for line in lines):
        program, *words = shlex.split(command)
        if program == "mistral":
            parser = argparse.ArgumentParser(exit_on_error=False)
            parser.add_argument("--json", action="store_true")
            importlib.import_module(cli.commands()[words[0]].module).arguments(parser)
            parser.parse_intermixed_args(words[1:])


def test_import_lines_name_what_is_public():
    for line in filter(lambda line: line.startswith("from mistral_"), indented(README)):
        package, _, names = line.removeprefix("from ").partition(" import ")
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        (public,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        assert set(names.split(", ")) <= set(ast.literal_eval(public)), line


@pytest.mark.parametrize("name", pictures_page.commands())
def test_an_image_is_what_the_command_above_it_makes(name, tmp_path, capsys):
    pictures_page.make(name, tmp_path / "made.png")
    made, kept = (np.asarray(Image.open(path)) for path in (tmp_path / "made.png", ROOT / name))
    assert np.array_equal(made, kept), "python tests/pictures_page.py --write"


def test_every_image_is_made_by_a_command():
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/images/*")} == set(pictures_page.commands())


def anchors(text: str) -> set[str]:
    """The names that a page's headings can be linked to by."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith("https://"):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), anchor


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_files_that_are_named_are_there(name):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w/]+\.\w+)", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.encode()) <= 12_000


def test_the_table_of_what_works_where_is_that_of_the_tests():
    assert features.in_readme() == features.table(), "python tests/features.py --write"


def test_the_page_of_the_command_line_is_made_of_the_commands():
    assert cli_page.in_page() == cli_page.text(), "python tests/cli_page.py --write"


def test_the_layout_tree_names_what_is_there():
    tree = README.partition("## Where things are")[2]
    inside = ""
    found = 0
    for line in re.search(r"```\n(.*?)```", tree, re.DOTALL).group(1).splitlines():
        for name in itertools.takewhile(lambda word: word.endswith(("/", ".py")), line.split()):
            if not line.startswith(" "):
                inside = name
            path = ROOT / name if not line.startswith(" ") else ROOT / inside / name
            assert path.exists(), path
            found += 1
    assert found > 12
