"""A picture as one self-contained page: no network, no fonts, one script that is named by its hash."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SequenceTooLongError
from .palette import DARK, LIGHT
from .panel import SELF, STYLES, WEIGHT, Panel, Reason, Token

if TYPE_CHECKING:
    from .picture import Picture

FEW_TOKENS = 512
MOST_CELLS = 1 << 23
"""Of all matrices together: some 22 MB of page."""
LABEL_LETTERS = 120
"""Columns of the same picture in letters."""
STEPS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
"""Attention weights in the legend."""


def page(picture: Picture) -> str:
    """The page as text. Raises SequenceTooLongError for more than 512 tokens, or for too many cells in all."""
    _check(picture)
    files = resources.files("mistral_core.data") / "page"
    script = (files / "page.js").read_text("utf-8")
    style = _variables() + (files / "page.css").read_text("utf-8")
    return Template((files / "page.html").read_text("utf-8")).substitute(
        title=html.escape(picture.title),
        description=html.escape(_description(picture)),
        hashes=f"style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        style=style,
        legend=_legend(picture),
        plain=html.escape(picture.text(columns=LABEL_LETTERS)),
        data=_data(picture),
        script=script,
    )


def _hash(text: str) -> str:
    """How a Content-Security-Policy names the one text that it lets in."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _check(picture: Picture) -> None:
    longest = max(map(len, picture.texts))
    if longest > FEW_TOKENS:
        raise SequenceTooLongError(f"{longest} tokens; a page holds {FEW_TOKENS}: give a part of the text.")
    count = sum(panel.reasons.size for panel in picture.panels)
    if count > MOST_CELLS:
        raise SequenceTooLongError(
            f"{count} cells in {len(picture.panels)} matrices; a page holds {MOST_CELLS}: "
            "give a shorter text, or one layer or head."
        )


def _data(picture: Picture) -> str:
    """JSON in which nothing can end the script element it stands in."""
    facts = {
        "sentences": [STYLES[reason].sentence for reason in Reason],
        "self": SELF,
        "weight": WEIGHT,
        "texts": [[_token(token) for token in row] for row in picture.texts],
        "panels": [_panel(panel) for panel in picture.panels],
    }
    text = json.dumps(facts, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _token(token: Token) -> dict[str, Any]:
    return {
        "label": token.label,
        "name": token.name,
        "position": token.position,
        "control": token.is_control,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    weights = None
    if panel.weights is not None:
        weights = _base64((panel.weights.clip(0, 1) * 65535).round().astype("<u2"))
    return {
        "title": panel.title,
        "row": panel.row,
        "window": panel.window,
        "size": len(panel.reasons),
        "reasons": _base64(panel.reasons),
        "weights": weights,
    }


def _base64(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _description(picture: Picture) -> str:
    size = len(picture.panels[0].reasons)
    what = "who sees whom" if picture.panels[0].weights is None else "who attends to whom, and how much"
    return f"{picture.title}: {what}, {size} by {size} tokens, queries in rows, keys in columns; arrow keys move."


def _variables() -> str:
    light, dark = ("".join(f"--{name}:{value};" for name, value in table.items()) for table in (LIGHT, DARK))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _legend(picture: Picture) -> str:
    if picture.panels[0].weights is not None:
        steps = "".join(f"<b>{step:g}</b>" for step in STEPS)
        return f'<span class="scale">{steps}</span><span>share of a token&rsquo;s attention</span>'
    found = sorted({int(value) for panel in picture.panels for value in np.unique(panel.reasons)})
    entries = [f'<span><canvas data-reason="{code}"></canvas>{STYLES[Reason(code)].title}</span>' for code in found]
    if Reason.SEES in found:
        entries.insert(1, f'<span><canvas data-reason="{int(Reason.SEES)}" data-self="1"></canvas>sees itself</span>')
    return "".join(entries)
