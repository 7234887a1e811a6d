"""docs/clients.md's table of which clients were run on the PyTorch models, made of the `client` markers of the tests.

`python tests/client_table.py` prints it; `--write` puts it into docs/clients.md. A row is true as long as its test
passes: those of tests/backends in `make test`, those of tests/clients in `make clients`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- made by tests/client_table.py -->\n", "<!-- end -->\n"
PINS = (ROOT / "constraints.txt", ROOT / "tests" / "clients" / "constraints.txt")


def versions() -> dict[str, str]:
    """Package -> the version that is pinned."""
    lines = [line for file in PINS for line in file.read_text().splitlines() if "==" in line]
    return dict(line.split("==") for line in lines)


def markers(path: Path) -> list[tuple[str, str, str]]:
    """(client, what was run, the remark on how it ended) of each `client` marker of a file, in order."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.client":
            client, what = map(ast.literal_eval, node.args)
            found.append((client, what, *(ast.literal_eval(keyword.value) for keyword in node.keywords)))
    return [(*row, "runs")[:3] for row in found]


def rows() -> list[tuple[str, str, str, str, str]]:
    """(client, version, what was run, how it ended, the command that repeats it)."""
    pinned, found = versions(), []
    for folder, command in (("backends", "make test"), ("clients", "make clients")):
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            found += [(client, pinned[client], what, end, command) for client, what, end in markers(path)]
    return sorted(dict.fromkeys(found), key=lambda row: row[0])


def table() -> str:
    """The table in Markdown."""
    lines = ["| client | version | what is run | result | by |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())]) + "\n"


def on_the_page() -> str:
    """The table as docs/clients.md has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
    print(table())
