"""A hook of mkdocs: README.md as the first page, and pages of the API made of `__all__` and the docstrings.

No backend is imported: what a package makes public is read from its source, as the docstrings are.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import mistral_core

ROOT = Path(__file__).parents[1]
PACKAGES = ("mistral_core", "mistral_torch", "mistral_flax", "mistral_tf")
ALSO = {
    "mistral_core": {
        "mistral_core.config.view": ("AssignableConfig",),
        "mistral_core.weights.checkpoint": ("Checkpoint", "load", "save"),
        "mistral_core.plan": ("plan", "suggest", "Plan", "Collective", "fits", "memory_of", "mesh_of"),
        "mistral_core.learning": (
            "Examples",
            "Feed",
            "Batch",
            "LearningStep",
            "Example",
            "CutExample",
            "ExampleCounts",
            "label_names",
        ),
        "mistral_core.errors": (),
    },
    "mistral_torch": {"mistral_torch.sharding": ("average",)},
    "mistral_flax": {"mistral_flax.scan": (), "mistral_flax.compat": ()},
    "mistral_tf": {"mistral_tf.compat": ()},
}
"""Modules beside what a package makes public: the names of each that are documented, or all that it defines."""


def public(package: str) -> dict[str, str]:
    """Name -> the dotted path of what it names, in the order of `__all__`."""
    if package == "mistral_core":
        return {name: _defined(name) for name in mistral_core.__all__ if name != "__version__"}
    origins: dict[str, str] = {}
    names: list[str] = []
    for node in ast.walk(_tree(package)):  # also what is imported for those who read types alone
        if isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.level else str(node.module)
            origins |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):  # one more name of the same thing
            origins |= {ast.unparse(target): origins[node.value.id] for target in node.targets}
    core = public("mistral_core")
    return {name: core.get(name, origins[name]) for name in names}


def _defined(name: str) -> str:
    value = getattr(mistral_core, name)
    if isinstance(value, type) or callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    module, attribute = mistral_core._PUBLIC[name]
    return f"mistral_core{module}.{attribute}"


def also(package: str) -> dict[str, list[str]]:
    """Module -> the dotted paths of its names that are documented beside those of the package."""
    found = {}
    for module, names in ALSO.get(package, {}).items():
        values = [getattr(importlib.import_module(module), name) for name in names]
        listed = [f"{value.__module__}.{value.__qualname__}" for value in values]
        kinds = (ast.ClassDef, ast.FunctionDef)
        defined = [node.name for node in _tree(module).body if isinstance(node, kinds)]
        found[module] = listed or [f"{module}.{name}" for name in defined if not name.startswith("_")]
    return found


@functools.cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def summary(path: str) -> str:
    """The first line of a docstring, with a colon before it, or nothing."""
    module, _, name = path.rpartition(".")
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return f": {(ast.get_docstring(node) or '').partition(chr(10))[0]}"
    return ""


def page(package: str) -> Iterator[str]:
    """The lines of a package's page: what is defined here, and links to what comes from the core."""
    yield from (f"# {package}", "", str(ast.get_docstring(_tree(package))), "")
    for name, path in public(package).items():
        if path.rpartition(".")[2] != name or not path.startswith(package):
            yield from (f"## {name} {{ #{package}.{name} }}", "", f"[{path}][].", "")
        else:
            yield from (f"::: {path}", "")
    for module, paths in also(package).items():
        yield from (f"## {module}", "", str(ast.get_docstring(_tree(module))), "")
        for path in paths:
            yield from (f"::: {path}", "    options:", "      heading_level: 3", "")


def landing() -> Iterator[str]:
    """The lines of the page that lists the public API by package."""
    yield from ("# API", "", "Every public name, made of each package's `__all__`; a name leads to its docstring.", "")
    for package in PACKAGES:
        yield from (f"## [{package}]({package}.md)", "")
        yield from (f"- [`{name}`][{path}]{summary(path)}" for name, path in public(package).items())
        for module, paths in also(package).items():
            yield from ("", f"`{module}`:", "")
            yield from (f"- [`{path.rpartition('.')[2]}`][{path}]{summary(path)}" for path in paths)
        yield ""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie nowhere."""
    readme = (ROOT / "README.md").read_text()
    made = {"index.md": re.sub(r"(\]\(|\]: )docs/", r"\1", readme), "api/index.md": "\n".join(landing())}
    made |= {f"api/{package}.md": "\n".join(page(package)) for package in PACKAGES}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into their names: the site does not hold them."""
    folder = ROOT if page.file.src_uri == "index.md" else ROOT / "docs" / Path(page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match[2]))
        outside = path.exists() and not path.is_relative_to(ROOT / "docs")
        return f"{match[1]} (`{path.relative_to(ROOT)}`)" if outside else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)#\s]+)\)", link, markdown)
