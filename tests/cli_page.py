"""What each command of `mistral` takes, as docs/cli.md has it.

`python tests/cli_page.py` prints it; `--write` puts it into docs/cli.md. It is made of the parsers and not of their
`--help`, whose lines differ between versions of Python.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from mistral_core import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
BEGIN, END = "<!-- made by tests/cli_page.py -->\n", "<!-- end -->\n"


def text() -> str:
    """A chapter for each command in Markdown."""
    return "\n".join(line for name, command in cli.commands().items() for line in _command(name, command))


def _command(name: str, command: cli.Command) -> Iterator[str]:
    parser, summary = argparse.ArgumentParser(add_help=False), command.summary
    importlib.import_module(command.module).arguments(parser)
    options = [action for action in parser._actions if action.option_strings]
    places = [action for action in parser._actions if not action.option_strings]
    usage = " ".join(["mistral", name, *map(_place, places), *(["[options]"] if options else [])])
    yield from (f"### {name}", "", f"{summary[0].upper()}{summary[1:]}.", "", f"    {usage}", "")
    if parser._actions:
        yield from ("| argument | meaning |", "|---|---|")
        yield from (f"| `{_name(action)}` | {_meaning(action)} |" for action in [*places, *options])
        yield ""


def _place(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest).upper()
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return _place(action)
    takes = "" if action.nargs == 0 else f" {_value(action)}"
    return f"{', '.join(action.option_strings)}{takes}"


def _value(action: argparse.Action) -> str:
    if action.choices and not _are_many(action):
        return r"\|".join(map(str, action.choices))
    return str(action.metavar or action.dest).upper()


def _meaning(action: argparse.Action) -> str:
    words = (action.help or "").replace("%%", "%")
    listed = ", ".join(map(str, action.choices)) if _are_many(action) else ""
    return (f"{words}: {listed}" if listed not in words else words).replace("|", r"\|")


def _are_many(action: argparse.Action) -> bool:
    return len(list(action.choices or ())) > 4


def in_page() -> str:
    """The chapters as docs/cli.md has them."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + text() + END + rest.partition(END)[2])
    print(text())
