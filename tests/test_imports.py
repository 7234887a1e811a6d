"""Who may import whom, proved in fresh interpreters and by ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"torch", "jax", "flax", "tensorflow", "keras"}
HEAVY = FRAMEWORKS | {"tokenizers", "huggingface_hub", "jinja2"}
OWN = {
    "mistral_torch": {"torch"},
    "mistral_flax": {"jax", "flax"},
    "mistral_tf": {"tensorflow", "keras"},
}
BACKENDS = set(OWN)
OPTIONAL = {
    "PIL", "gguf", "h5py", "huggingface_hub", "jinja2", "kitoken", "mistral_common", "prompt_toolkit", "pydantic",
    "rich", "tensorstore", "tokenizers", "tqdm",
}  # fmt: skip
"""What is slow to import or may not be there: a function that needs one of these imports it."""


def loaded_by(*statements: str) -> list[set[str]]:
    """What is in sys.modules after each of some statements, all in one fresh interpreter."""
    told = "import sys\nprint(*sys.modules)"
    code = "\n".join(f"{statement}\n{told}" for statement in statements)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return [set(line.split()) for line in run.stdout.splitlines()]


@cache
def imported_in(package: str) -> dict[str, set[str]]:
    """File -> top-level modules its source imports anywhere."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").partition(".")[0])
        found[str(path.relative_to(ROOT))] = names
    return found


def test_core_loads_nothing_heavy():
    statements = [
        "import mistral_core",
        "from mistral_core import MistralConfig, GenerationConfig",
        "import mistral_core.weights.checkpoint",
        "from mistral_core.reference import heads",
        "from mistral_core.text.tokenizer import MistralTokenizer",
        "from mistral_core.cli import main",
    ]
    for statement, loaded in zip(statements, loaded_by(*statements), strict=True):
        assert not loaded & HEAVY, statement


@pytest.mark.parametrize("package", sorted(BACKENDS))
def test_a_backend_loads_no_other(package):
    (loaded,) = loaded_by(f"import {package}")
    assert not loaded & (BACKENDS - {package})
    assert "torch._dynamo" not in loaded, "torch's compiler takes as long to import as torch"


@pytest.mark.parametrize("package", sorted(BACKENDS))
def test_a_backend_imports_core_and_its_framework_only(package):
    for file, names in imported_in(package).items():
        foreign = names & (FRAMEWORKS | BACKENDS | {"conformance", "tests"}) - OWN[package] - {package}
        assert not foreign, f"{file} imports {foreign}"


def test_core_imports_no_framework_no_backend_and_not_what_proves_it():
    for file, names in imported_in("mistral_core").items():
        above = names & (FRAMEWORKS | BACKENDS | {"conformance", "tests", "benchmarks"})
        assert not above, f"{file} imports {above}"


def test_conformance_reaches_backends_in_their_adapters_only():
    for file, names in imported_in("conformance").items():
        adapter = Path(file).parent.name == "adapters"
        assert not names & BACKENDS, file
        assert adapter or not names & FRAMEWORKS, file


def test_every_file_of_tests_has_a_name_of_its_own():
    """They are modules beside each other: two of a name cannot be collected together, as `make sweep` does."""
    files = (path for folder in ("tests", "conformance") for path in (ROOT / folder).rglob("test_*.py"))
    named = Counter(path.stem for path in files)
    assert len(named) > 100
    assert [name for name, count in named.items() if count > 1] == []


def test_no_test_imports_a_conftest():
    """There are several, and the name is that of the one which was loaded last: helpers have names of their own."""
    for file, names in imported_in("tests").items():
        assert "conftest" not in names, file


def modules_of(package: str) -> dict[str, Path]:
    """Dotted name -> file."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def arrows(path: Path, name: str) -> list[tuple[str, bool]]:
    """(what a file imports, as an absolute name; whether a function does), what only a type checker reads left out."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    unread = {id(node) for block in blocks for node in ast.walk(block)}
    inner = {id(node) for function in functions for node in ast.walk(function)}
    told = []
    for node in ast.walk(tree):
        if id(node) in unread or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        told += [(each, id(node) in inner) for each in found]
    return told


@pytest.mark.parametrize("package", ["mistral_core", "conformance", *sorted(BACKENDS)])
def test_no_import_leads_back_to_itself(package):
    """Imports inside functions are counted: they are how a circle is hidden."""
    modules = modules_of(package)
    graph = {}
    for name, path in modules.items():
        targets = (each if each in modules else each.rpartition(".")[0] for each, _ in arrows(path, name))
        graph[name] = {target for target in targets if target in modules and target != name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_functions_of_the_core_import_what_is_optional_or_slow_only():
    commands = ROOT / "mistral_core" / "cli"
    for name, path in modules_of("mistral_core").items():
        inside = {each for each, in_function in arrows(path, name) if in_function}
        if commands not in path.parents:  # a command is to start fast, and imports what its options ask for
            wrong = {each for each in inside if each.partition(".")[0] not in OPTIONAL}
            assert not wrong, f"{name} imports {wrong} inside a function"


def test_a_class_name_is_one_thing():
    """A name means one class in the core and its suite, and one in each backend, whose names are each other's."""
    found: dict[tuple[str, str], list[str]] = {}
    for package in ("mistral_core", "conformance", *sorted(BACKENDS)):
        for module, path in modules_of(package).items():
            if module.startswith(("mistral_core.reference", "conformance.adapters")):
                continue  # the reference has the backends' names, and each framework an adapter
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault((package if package in BACKENDS else "", node.name), []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_the_lists_above_are_not_empty():
    assert len(imported_in("mistral_core")) > 20
    assert len(imported_in("tests")) > 50
    assert any("torch" in names for names in imported_in("mistral_torch").values())
