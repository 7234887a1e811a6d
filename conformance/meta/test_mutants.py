"""Every planted error turns its check red in every backend; the untouched copy stays green."""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
from pathlib import Path

import pytest

import mistral_core.generation.driver
import mistral_core.generation.ending
from conformance import suite
from conformance.meta.mutants import BACKENDS, CORE, MUTANTS, PACKED, Everywhere

ROOT = Path(__file__).parents[2]
TOGETHER = {name: pytest.mark.xdist_group(f"mutants-{name}") for name in BACKENDS}
"""One process for the mutants of a backend, which compiles alike programs once."""
EACH = [pytest.param(name, marks=together) for name, together in TOGETHER.items()]


@pytest.fixture
def copy_of(tmp_path, monkeypatch):
    """A function that copies a backend's package under another name, with an edit."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a copy is imported once
    made = []

    def copy(backend, name, edit=None):
        package = f"mutant_{backend}_" + "".join(c if c.isalnum() else "_" for c in name)
        shutil.copytree(ROOT / f"mistral_{backend}", tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        # a process registers a framework's operations once
        (tmp_path / package / "native.py").write_text(
            f"import sys\n\nimport mistral_{backend}.native as original\n\nsys.modules[__name__] = original\n"
        )
        if edit is not None:
            path = tmp_path / package / edit.file
            path.write_text(edited(path.read_text(), edit))
        importlib.invalidate_caches()
        made.append(package)
        return package

    yield copy
    for name in [m for m in sys.modules if m.partition(".")[0] in made]:
        del sys.modules[name]
    _restore_names_of_keras(made)


def _restore_names_of_keras(packages):
    """Keras finds classes by the name they are registered by: without this, a later test loads the mutant's."""
    keras = sys.modules.get("keras")
    registered = keras.saving.get_custom_objects() if keras else {}
    for name, found in list(registered.items()):
        package, _, module = found.__module__.partition(".")
        if package in packages:
            original = getattr(sys.modules.get(f"mistral_tf.{module}"), found.__name__, None)
            registered.pop(name)
            if original is not None:
                registered[name] = original


def edited(text, edit):
    assert text.count(edit.old) == edit.times, f"{edit.file} holds {edit.old!r} {text.count(edit.old)} times"
    return text.replace(edit.old, edit.new)


def marks(backend, mutant):
    """`slow` where torch stands for the others: the same text is edited, and the check is one function for all."""
    others = isinstance(mutant.edits, Everywhere) and backend != "torch"
    return (TOGETHER[backend], pytest.mark.slow) if others else TOGETHER[backend]


@pytest.mark.parametrize("backend", EACH)
def test_an_untouched_copy_passes(backend, copy_of):
    """Copying breaks nothing; that each check is green on what is copied is `conformance/test_conformance.py`'s."""
    package = copy_of(backend, "untouched")
    subject = suite.Subject(suite.adapters.get(backend, package), "eager", "float32")
    found = suite.CHECKS["whole window"].run(subject)
    assert found
    assert all(item.passed for item in found), "\n".join(str(item) for item in found)


@pytest.mark.parametrize("backend", EACH)
def test_every_edit_stands_where_it_says(backend):
    for mutant in MUTANTS:
        if backend in mutant.edits:
            edit = mutant.edits[backend]
            assert edited((ROOT / f"mistral_{backend}" / edit.file).read_text(), edit)


@pytest.mark.parametrize(
    ("backend", "mutant"),
    [
        pytest.param(backend, mutant, id=f"{backend}-{mutant.name}", marks=marks(backend, mutant))
        for mutant in MUTANTS
        for backend in mutant.edits
    ],
)
def test_every_mutant_is_killed(backend, mutant, copy_of):
    package = copy_of(backend, mutant.name, mutant.edits[backend])
    subject = suite.Subject(suite.adapters.get(backend, package), mutant.implementation, mutant.dtype)
    try:
        killed = suite.CHECKS[mutant.check].fails(subject)
    except Exception:
        if not mutant.raises:
            raise
        killed = True
    assert killed, f"{mutant.name}: {mutant.check} stays green"


FREE = [EACH[0], *(pytest.param(name, marks=(TOGETHER[name], pytest.mark.slow)) for name in BACKENDS[1:])]
"""The backends of mutants that no framework changes: torch stands for the others."""


@pytest.mark.parametrize("backend", FREE)
@pytest.mark.parametrize("edit", CORE, ids=lambda edit: edit.new)
def test_every_mutant_of_the_decode_loop_is_killed(backend, edit, monkeypatch):
    source = edited(Path(mistral_core.generation.ending.__file__).read_text(), edit)
    mutated = type(sys)("mistral_core.generation.ending_mutant")
    mutated.__package__ = "mistral_core.generation"
    exec(compile(source, edit.file, "exec"), mutated.__dict__)
    for name in ("Ending", "column"):
        monkeypatch.setattr(mistral_core.generation.driver, name, getattr(mutated, name))
    assert suite.CHECKS["greedy"].fails(suite.subject(backend, "eager", "float32"))


@pytest.fixture
def mutate(monkeypatch):
    """A function that gives the functions of a module of core's packing the code that they have after an edit."""

    def put(edit):
        original = importlib.import_module("mistral_core.quantization." + edit.file.removesuffix(".py"))
        mutated = type(sys)(original.__name__ + "_mutant")
        mutated.__package__ = original.__package__
        monkeypatch.setitem(sys.modules, mutated.__name__, mutated)  # where dataclasses look
        exec(compile(edited(inspect.getsource(original), edit), edit.file, "exec"), mutated.__dict__)
        for name, function in functions_of(mutated).items():
            monkeypatch.setattr(functions_of(original)[name], "__code__", function.__code__)

    return put


def functions_of(module):
    """Name -> function of those written in a module, methods among them."""
    owners = [module, *(kind for _, kind in inspect.getmembers(module, inspect.isclass))]
    return {
        function.__qualname__: function
        for owner in owners
        for _, function in inspect.getmembers(owner, inspect.isfunction)
        if function.__module__ == module.__name__ and function.__code__.co_filename != "<string>"
    }


@pytest.mark.parametrize("backend", FREE)
@pytest.mark.parametrize("mutant", PACKED, ids=lambda mutant: mutant.name)
def test_every_mutant_of_packing_is_killed(backend, mutant, mutate):
    mutate(mutant.edits["core"])
    assert suite.CHECKS[mutant.check].fails(suite.subject(backend, "eager", "float32")), (
        f"{mutant.name}: {mutant.check} stays green"
    )
