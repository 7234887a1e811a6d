"""Picture: matrices over the tokens of one or more texts; who sees whom, why not, and with what weight."""

from __future__ import annotations

import enum
import html
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..arrays import Array
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


class Reason(enum.IntEnum):
    """Why a token sees another, or does not; the values of `Panel.reasons`."""

    SEES = 0
    FUTURE = 1
    WINDOW = 2
    DOCUMENT = 3
    PADDING = 4


class Style(NamedTuple):
    """How a reason is told."""

    letter: str
    """Without colours."""
    title: str
    sentence: str
    """With {query}, {key}, {distance} and {window} to be filled in."""


STYLES = {
    Reason.SEES: Style("#", "sees", "{query} sees {key}."),
    Reason.FUTURE: Style(".", "comes later", "{query} does not see {key}, which comes later."),
    Reason.WINDOW: Style(
        "w",
        "outside the window",
        "{query} does not see {key}, {distance} tokens back: outside the window of {window} (itself included).",
    ),
    Reason.DOCUMENT: Style("d", "another document", "{query} does not see {key}, which is in another document."),
    Reason.PADDING: Style("p", "padding", "{query} and {key}: padding sees nothing and is seen by no token."),
}
SELF = "{query} sees itself."
WEIGHT = "{query} gives {weight} of its attention to {key}."


class Token(NamedTuple):
    """One token of a text, safe to show anywhere."""

    label: str
    position: int | None
    """The number of real tokens before it in its row; None for padding."""
    document: int | None = None
    """Which of several packed documents it is in."""
    is_control: bool = False

    @property
    def name(self) -> str:
        """As sentences call it."""
        if self.position is None:
            return "padding"
        inside = "" if self.document is None else f", document {self.document}"
        return f"'{self.label.strip('▁') or self.label}' (position {self.position}{inside})"


class Panel(NamedTuple):
    """One matrix: the tokens of a text on both axes, for some layers."""

    title: str
    row: int
    """Which of the texts."""
    layers: tuple[int, ...]
    window: int | None
    reasons: Array
    """[T, T] uint8, of `Reason`: row t, column s says whether query t sees key s."""
    head: int | None = None
    weights: Array | None = None
    """[T, T] float32: the share of its attention that query t gives to key s."""


@dataclass(frozen=True, eq=False)
class Picture:
    """What `AttentionMaskVisualizer` and `AttentionVisualizer` return; shown as it is in a notebook."""

    title: str
    texts: tuple[tuple[Token, ...], ...]
    """The tokens of each row of the batch."""
    panels: tuple[Panel, ...]

    def mask(self, panel: int = 0) -> Array:
        """[T, T] bool: which keys (columns) each query (row) sees."""
        return self._panel(panel).reasons == Reason.SEES

    def weights(self, panel: int = 0) -> Array | None:
        """[T, T] float32: the attention weights, or None where the picture is of a mask."""
        return self._panel(panel).weights

    def explain(self, query: int, key: int, panel: int = 0) -> str:
        """One sentence about a cell, by the columns of its two tokens. Raises InputError outside of the matrix."""
        shown = self._panel(panel)
        tokens = self.texts[shown.row]
        if not (0 <= query < len(tokens) and 0 <= key < len(tokens)):
            raise InputError(f"query, key must be two columns in [0, {len(tokens)}), got {query}, {key}.")
        reason = Reason(int(shown.reasons[query, key]))
        sentence = STYLES[reason].sentence
        if reason is Reason.SEES and query == key:
            sentence = SELF
        if reason is Reason.SEES and shown.weights is not None:
            sentence = WEIGHT
        first, second = tokens[query], tokens[key]
        return sentence.format(
            query=first.name,
            key="itself" if query == key and shown.weights is not None else second.name,
            distance=(first.position or 0) - (second.position or 0),
            window=shown.window,
            weight="" if shown.weights is None else f"{shown.weights[query, key]:.4f}",
        )

    def text(self, *, columns: int | None = None) -> str:
        """The picture in plain letters, at most so many columns wide."""
        from .terminal import plain

        return plain(self, columns=columns)

    def print(self, file: TextIO | None = None) -> None:
        """Print it: in colour on a terminal that has them, else in letters."""
        from .terminal import show

        show(self, sys.stdout if file is None else file)

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page; written to `path` if given. Raises SequenceTooLongError, ConversionError."""
        from ..disk.files import write_file
        from .page import page

        text = page(self)
        if path is not None:
            write_file(path, text.encode())
        return text

    def png(self, path: str | os.PathLike[str] | None = None, *, font: str | None = None) -> Image:
        """A PIL image; written to `path` if given. `font` is a font file for what PIL's own font lacks.

        Raises SequenceTooLongError, ConversionError, InputError (font), MissingExtraError without Pillow.
        """
        import io

        from ..disk.files import write_file
        from .png import draw

        image = draw(self, font=font)
        if path is not None:
            data = io.BytesIO()
            image.save(data, "PNG")
            write_file(path, data.getvalue())
        return image

    def to_dict(self) -> dict[str, Any]:
        """Everything in lists and numbers, as `--json` prints it."""
        panels = []
        for index, panel in enumerate(self.panels):
            facts = panel._asdict() | {"reasons": None, "visible": self.mask(index).astype(int).tolist()}
            facts["weights"] = None if panel.weights is None else panel.weights.round(6).astype(float).tolist()
            panels.append({name: value for name, value in facts.items() if name != "reasons"})
        return {"title": self.title, "texts": [[t._asdict() for t in row] for row in self.texts], "panels": panels}

    def __repr__(self) -> str:
        return f"Picture({self.title!r}, texts={len(self.texts)}, panels={len(self.panels)})"

    def _repr_html_(self) -> str:
        # a frame of its own: neither the notebook's style nor its scripts meet the page's
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(self.html())}" title="{html.escape(self.title)}" '
            'style="width:100%;height:640px;border:0"></iframe>'
        )

    def _panel(self, index: int) -> Panel:
        try:
            return self.panels[index]
        except IndexError:
            raise InputError(f"panel: {index}; the picture has {len(self.panels)}, counted from 0.") from None
