"""The README's table of what works where, made of the `feature` markers of the tests that prove it.

`python tests/features.py` prints it; `python tests/features.py --write` puts it into the README.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- made by tests/features.py -->\n", "<!-- end -->\n"
COLUMNS = {"torch": "PyTorch", "flax": "JAX / Flax", "tf": "Keras / TensorFlow"}
PAGES = {"torch": "pytorch", "flax": "jax", "tf": "keras"}
CHAPTERS = {
    "generate": "generation",
    "cache_int8": "generation",
    "conversation": "text-and-chat",
    "pipelines": "text-and-chat",
    "mask_is_used": "pictures",
    "test_training": "learning",
}
"""A word in a test file's name -> the page of its features; those of other files are on the framework's own page."""


def markers(path: Path) -> list[tuple[str, str | None, set[str]]]:
    """(feature, note, backends) of each marker of a file: of the backend it is named for, or of its tests'."""
    tree = ast.parse(path.read_text())
    owner = path.stem.split("_")[1]
    if owner in COLUMNS:
        return [(*_arguments(node), {owner}) for node in ast.walk(tree) if _is_marker(node)]
    return [
        (*_arguments(marker), _of_test(test))
        for test in tree.body
        if isinstance(test, ast.FunctionDef)
        for marker in test.decorator_list
        if _is_marker(marker)
    ]


def _is_marker(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature"


def _arguments(marker: ast.AST) -> tuple[str, str | None]:
    assert isinstance(marker, ast.Call)
    notes = [ast.literal_eval(keyword.value) for keyword in marker.keywords if keyword.arg == "note"]
    return ast.literal_eval(marker.args[0]), notes[0] if notes else None


def _of_test(test: ast.FunctionDef) -> set[str]:
    """All backends where a test runs on each of them, else those that its name names."""
    if {"backend", "model", "pipes", "writer"} & {argument.arg for argument in test.args.args}:
        return {*COLUMNS}
    words = test.name.replace("tensorflow", "tf").split("_")
    return {name for name in COLUMNS if name in words}


def rows() -> dict[str, dict[str, tuple[str, str]]]:
    """Feature -> backend -> ("yes" or "untested", the page of docs/ that has it)."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for path in sorted((ROOT / "tests" / "backends").glob("test_*.py")):
        for feature, note, backends in markers(path):
            assert backends, f"{path.name}: {feature}: no backend"
            for backend in backends:
                row = found.setdefault(feature, {})
                answer = ("yes", _page(path.stem, backend)) if note is None else ("untested", "limits")
                row[backend] = min(row.get(backend, answer), answer)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0].lower())))


def _page(test: str, backend: str) -> str:
    return next((page for word, page in CHAPTERS.items() if word in test), PAGES[backend])


def table() -> str:
    """In Markdown a table of what several frameworks have, then a line of what each has alone."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    alone: dict[str, list[str]] = {backend: [] for backend in COLUMNS}
    for name, row in rows().items():
        if len(row) > 1:
            lines.append(f"| {_linked(name, row)} |")
        else:
            ((backend, (answer, page)),) = row.items()
            alone[backend].append(name if answer == "yes" else f"{name} ([{answer}][{page}])")
    for backend, names in alone.items():
        lines += ["", f"[{COLUMNS[backend]}][{PAGES[backend]}] alone: {'; '.join(names)}."]
    pages = sorted({page for row in rows().values() for _, page in row.values()})
    return "\n".join([*lines, "", *(f"[{page}]: docs/{page}.md" for page in pages)]) + "\n"


def _linked(name: str, row: dict[str, tuple[str, str]]) -> str:
    """The cells of a row; the link is at the name where all have the same."""
    if len(cells := set(row.values())) == 1:
        ((_, page),) = cells
        return " | ".join([f"[{name}][{page}]", *(row[b][0] if b in row else "no" for b in COLUMNS)])
    return " | ".join([name, *(f"[{row[b][0]}][{row[b][1]}]" if b in row else "no" for b in COLUMNS)])


def in_readme() -> str:
    """The table as the README has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    print(table())
