"""Picture: matrices over the tokens of one or more texts; who sees whom, why not, and with what weight."""

from __future__ import annotations

import html
import io
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from ..arrays import Array
from ..disk.files import write_file
from ..errors import InputError
from .page import page
from .panel import SELF, STYLES, WEIGHT, Panel, Reason, Token
from .png import draw
from .terminal import plain, show

if TYPE_CHECKING:
    from PIL.Image import Image


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
        return plain(self, columns=columns)

    def print(self, file: TextIO | None = None) -> None:
        """Print it: in colour on a terminal that has them, else in letters."""
        show(self, sys.stdout if file is None else file)

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page; written to `path` if given. Raises SequenceTooLongError, ConversionError."""
        text = page(self)
        if path is not None:
            write_file(path, text.encode())
        return text

    def png(self, path: str | os.PathLike[str] | None = None, *, font: str | None = None) -> Image:
        """A PIL image; written to `path` if given. `font` is a font file for what PIL's own font lacks.

        Raises SequenceTooLongError, ConversionError, InputError (font), MissingExtraError without Pillow.
        """
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
