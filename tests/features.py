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
    if {"backend", "model", "pipes"} & {argument.arg for argument in test.args.args}:
        return {*COLUMNS}
    words = test.name.replace("tensorflow", "tf").split("_")
    return {name for name in COLUMNS if name in words}


def table() -> str:
    """The table in Markdown: what all have first, then what fewer have."""
    cells: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "tests" / "backends").glob("test_*.py")):
        for feature, note, backends in markers(path):
            assert backends, f"{path.name}: {feature}: no backend"
            for backend in backends:
                row = cells.setdefault(feature, {})
                row[backend] = "yes" if note is None and row.get(backend, "yes") == "yes" else note or row[backend]
    ordered = sorted(
        cells.items(), key=lambda item: (-len(item[1]), [b not in item[1] for b in COLUMNS], item[0].lower())
    )
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {name} | " + " | ".join(row.get(backend, "") for backend in COLUMNS) + " |" for name, row in ordered]
    return "\n".join(lines) + "\n"


def in_readme() -> str:
    """The table as the README has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    print(table())
