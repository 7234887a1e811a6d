"""A picture in a terminal, never wider than it is: in colours where there are some, else in letters."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TextIO

from .labels import ascii_only
from .palette import DARK, SELF, TERMINAL, weight_colour
from .panel import STYLES, Panel, Reason, Token

if TYPE_CHECKING:
    from .picture import Picture

LONGEST_LABEL = 16
FEWEST_COLUMNS = 4
"""Tokens shown of any text, however narrow the terminal."""
ROWS_ABREAST = 4
"""From so many panels of weights on, they are shown small, beside each other."""
GLYPHS = {Reason.FUTURE: " ·", Reason.WINDOW: "▒▒", Reason.DOCUMENT: "╱╱", Reason.PADDING: " ×"}

STEPS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Attention weights in the legend."""

Segment = tuple[str, str]
"""A piece of a line and its rich style."""


class Screen(NamedTuple):
    """What can be shown."""

    columns: int | None
    colour: bool
    unicode: bool = True


def plain(picture: Picture, *, columns: int | None = None, unicode: bool = True) -> str:
    """The picture in letters."""
    found = lines(picture, Screen(columns, colour=False, unicode=unicode))
    return "\n".join("".join(text for text, _ in line).rstrip() for line in found)


def show(picture: Picture, file: TextIO) -> None:
    """Print a picture to a file or a terminal."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        columns = shutil.get_terminal_size().columns if file.isatty() or "COLUMNS" in os.environ else None
        print(plain(picture, columns=columns, unicode=False), file=file)
        if file.isatty():
            print("mistral: colours need rich; pip install 'mistral-frameworks[chat]'.", file=sys.stderr)
        return
    console = Console(file=file, highlight=False, soft_wrap=True)
    unicode = (file.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    columns = console.width if console.is_terminal or "COLUMNS" in os.environ else None
    if not unicode or console.color_system is None or console.no_color:
        print(plain(picture, columns=columns, unicode=unicode), file=file)
        return
    for line in lines(picture, Screen(columns, colour=True)):
        console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False)


def lines(picture: Picture, screen: Screen) -> Iterator[list[Segment]]:
    """Yield the picture line by line: title, panels, legend."""
    yield [(_cut(picture.title, screen), "bold")]
    if sum(panel.weights is not None for panel in picture.panels) >= ROWS_ABREAST:
        yield from _grid(picture, screen)
    else:
        for panel in picture.panels:
            yield []
            yield [(_cut(panel.title, screen), "")]
            yield from _matrix(panel, picture.texts[panel.row], screen)
    yield []
    yield from _legend(picture, screen)


def _matrix(panel: Panel, tokens: Sequence[Token], screen: Screen) -> Iterator[list[Segment]]:
    """Positions written downwards, then a line for each query: its position, its label, its cells."""
    names = [token.label if screen.unicode else ascii_only(token.label) for token in tokens]
    label = min(LONGEST_LABEL, max(map(_width, names)), (screen.columns or 80) // 3)
    numbers = ["" if token.position is None else str(token.position) for token in tokens]
    number = max(map(len, numbers))
    room = None if screen.columns is None else max(screen.columns - label - number - 2, FEWEST_COLUMNS)
    shown, cell = _fitting(len(tokens), room)
    for digit in range(number):
        heads = "".join((" " if i is None else numbers[i].rjust(number)[digit]).rjust(cell) for i in shown)
        yield [(" " * (number + label + 2), ""), (heads, "dim")]
    gap = "…" if screen.unicode else "~"
    for query in shown:
        if query is None:
            yield [(" " * number + f" {gap}", "dim")]
            continue
        yield [
            (numbers[query].rjust(number) + " ", "dim"),
            (_fit(names[query], label, screen), "bold" if tokens[query].is_control else ""),
            (" ", ""),
            *((gap.rjust(cell), "dim") if key is None else _cell(panel, query, key, cell, screen) for key in shown),
        ]
    if None in shown:
        yield _left_out(len(tokens) - len(shown) + 1, len(tokens), screen)


def _left_out(hidden: int, tokens: int, screen: Screen) -> list[Segment]:
    return [(_cut(f"{hidden} of {tokens} tokens left out: a page or a PNG has all", screen), "italic")]


def _fitting(tokens: int, room: int | None) -> tuple[list[int | None], int]:
    """The columns to show, None for those left out, and the width of a cell."""
    if room is None or 2 * tokens <= room:
        return [*range(tokens)], 2
    if tokens <= room:
        return [*range(tokens)], 1
    first = (room - 1) // 2
    return [*range(first), None, *range(tokens - (room - 1 - first), tokens)], 1


def _cell(panel: Panel, query: int, key: int, width: int, screen: Screen) -> Segment:
    reason = Reason(int(panel.reasons[query, key]))
    if panel.weights is not None and reason is Reason.SEES:
        weight = float(panel.weights[query, key])
        if screen.colour:
            return " " * width, f"on {_hex(weight)}"
        return _tenth(weight).rjust(width), ""
    if not screen.colour:
        letter = STYLES[reason].letter if panel.weights is None else " "
        return letter.rjust(width), ""
    if reason is Reason.SEES:
        return " " * width, f"on {SELF if query == key else TERMINAL[reason]}"
    style = TERMINAL[reason] if reason in (Reason.WINDOW, Reason.DOCUMENT) else f"dim {TERMINAL[reason]}"
    return GLYPHS[reason][-width:], style


def _grid(picture: Picture, screen: Screen) -> Iterator[list[Segment]]:
    """Panels beside each other, one character a cell; in colour two rows of cells a line."""
    widths = [max(len(picture.texts[panel.row]), len(_short(panel))) + 2 for panel in picture.panels]
    abreast = max((screen.columns or 120) // max(widths), 1)
    for first in range(0, len(picture.panels), abreast):
        group = picture.panels[first : first + abreast]
        drawn = [list(_small(panel, max(widths), screen)) for panel in group]
        blank: list[Segment] = [(" " * max(widths), "")]
        yield []
        for parts in itertools.zip_longest(*drawn, fillvalue=blank):
            yield [piece for part in parts for piece in part]
    tokens = max(len(panel.reasons) for panel in picture.panels)
    if screen.columns is not None and tokens > screen.columns - 2:
        yield _left_out(tokens - (screen.columns - 2), tokens, screen)


def _small(panel: Panel, width: int, screen: Screen) -> Iterator[list[Segment]]:
    """A title and the cells, each line `width` wide."""
    yield [(_short(panel).ljust(width), "bold")]
    size = min(len(panel.reasons), width - 2, (screen.columns or width) - 2)
    for query in range(0, size, 2 if screen.colour else 1):
        cells: list[Segment] = []
        for key in range(size):
            if screen.colour:
                above, below = (_pixel(panel, row, key) if row < size else "default" for row in (query, query + 1))
                cells.append(("▀", f"{above} on {below}"))
            else:
                cells.append(_cell(panel, query, key, 1, screen))
        yield [*cells, (" " * (width - size), "")]


def _pixel(panel: Panel, query: int, key: int) -> str:
    seen = panel.weights is not None and panel.reasons[query, key] == Reason.SEES
    return _hex(float(panel.weights[query, key])) if seen and panel.weights is not None else DARK["paper"]


def _short(panel: Panel) -> str:
    """A panel's place in a grid."""
    return panel.title.replace("layer ", "L").replace("head ", "H").replace("text ", "T")


def _legend(picture: Picture, screen: Screen) -> Iterator[list[Segment]]:
    """What the colours or letters mean; of reasons, those that occur."""
    if picture.panels[0].weights is not None:
        if screen.colour:
            yield from _wrapped([[("  ", f"on {_hex(step)}"), (f" {step:g}", "dim")] for step in STEPS], screen)
        else:
            yield from _wrapped([[(text, "")] for text in ("1-9 tenths of attention", ". less", "# all")], screen)
        return
    found = {Reason(int(value)) for panel in picture.panels for value in set(panel.reasons.ravel().tolist())}
    entries: list[list[Segment]] = []
    for reason in sorted(found):
        if not screen.colour:
            entries.append([(f"{STYLES[reason].letter} {STYLES[reason].title}", "")])
            continue
        glyph = ("  ", f"on {TERMINAL[reason]}") if reason is Reason.SEES else (GLYPHS[reason], TERMINAL[reason])
        entries.append([glyph, (f" {STYLES[reason].title}", "dim")])
        if reason is Reason.SEES:
            entries.append([("  ", f"on {SELF}"), (" sees itself", "dim")])
    yield from _wrapped(entries, screen)


def _wrapped(entries: list[list[Segment]], screen: Screen) -> Iterator[list[Segment]]:
    """Yield lines of as many entries as fit."""
    line: list[Segment] = []
    for entry in entries:
        if line and screen.columns is not None and _length(line) + _length(entry) + 3 > screen.columns:
            yield line
            line = []
        line = [*line, *([("   ", "")] if line else []), *entry]
    yield line


def _length(line: list[Segment]) -> int:
    return sum(_width(text) for text, _ in line)


def _tenth(weight: float) -> str:
    tenths = round(10 * weight)
    return "#" if tenths >= 10 else str(tenths) if weight >= 0.05 else "."


def _hex(weight: float) -> str:
    return "#{:02x}{:02x}{:02x}".format(*weight_colour(weight, DARK))


def _width(text: str) -> int:
    """Columns of a terminal; wide characters take two."""
    try:
        from rich.cells import cell_len
    except ImportError:
        return len(text)
    return cell_len(text)


def _fit(text: str, columns: int, screen: Screen) -> str:
    """The text cut or filled to exactly so many columns."""
    if _width(text) > columns:
        mark = "…" if screen.unicode else "~"
        while _width(text) >= columns:
            text = text[:-1]
        text += mark
    return text + " " * (columns - _width(text))


def _cut(text: str, screen: Screen) -> str:
    text = text if screen.unicode else ascii_only(text)
    return text if screen.columns is None or _width(text) <= screen.columns else _fit(text, screen.columns, screen)
