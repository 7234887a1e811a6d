"""AttentionMaskVisualizer and AttentionVisualizer: the masks and the weights of a checkpoint for any text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import backend as backends
from ..arrays import Array
from ..config import MistralConfig
from ..errors import InputError, MissingExtraError
from ..hub import download
from ..plain import plain_int
from ..reference import ops
from ..reference.model import forward
from ..telling import printable
from ..text.tokenizer import MistralTokenizer
from ..weights import loading
from .inputs import Rows, Source, read
from .panel import Panel, Reason
from .picture import Picture

REFERENCE = "reference"
LOADING = ("dtype", "torch_dtype", "device", "device_map", "attn_implementation")
"""Arguments that go to `from_pretrained`."""


class _Visualizer:
    """What both have: a checkpoint, and the backend whose functions are looked at."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        backend: str | None = None,
        framework: str | None = None,
        **overrides: Any,
    ) -> None:
        self.path = path = download.held(path)  # config, tokenizer and model are of one moment
        self._loading = {name: overrides.pop(name) for name in LOADING if name in overrides}
        self.config = MistralConfig.from_pretrained(path, **overrides)
        hub = {name: overrides[name] for name in download.ARGUMENTS if name in overrides}
        self.tokenizer = MistralTokenizer.from_pretrained(path, **hub)
        name = self._chosen(backend, framework)
        self.backend = None if name == REFERENCE else backends.get(name)
        self._overrides = overrides

    def _chosen(self, backend: str | None, framework: str | None) -> str:
        """The backend that is named, or whose dtype or device is given; else the reference."""
        given = list(self._loading.values())
        if backend is None and framework is None and not any(map(backends.owner, given)):
            return REFERENCE
        return backends.chosen(backend, framework=framework, given=given)

    def _title(self, subject: str) -> str:
        made = "float64 reference" if self.backend is None else backends.version(self.backend)
        return printable(f"{subject} of {Path(os.fspath(self.path)).name}, {made}")

    def _visible(self, rows: Rows, window: int | None) -> Array:
        """[B, T, T] bool, of the function that the model's attention calls."""
        begin = np.zeros(len(rows.input_ids), np.int32)
        if self.backend is None:
            order = ops.token_order(rows.attention_mask, begin)
            return ops.attention_mask(order, order, window, document_ids_BT=rows.document_ids)
        array, documents = self.backend.from_numpy, rows.document_ids
        order = self.backend.token_order(array(rows.attention_mask), array(begin))
        visible = self.backend.attention_mask(
            order, order, window, document_ids_BT=None if documents is None else array(documents)
        )
        return np.asarray(self.backend.to_numpy(visible))

    def _reasons(self, rows: Rows, window: int | None) -> Array:
        """[B, T, T] uint8: what is visible is asked, only why the rest is not is concluded."""
        order = ops.token_order(rows.attention_mask, np.zeros(len(rows.input_ids), int))
        query, key = order[:, :, None], order[:, None, :]
        reasons = np.where(key > query, Reason.FUTURE, Reason.WINDOW)
        if rows.document_ids is not None:
            reasons[rows.document_ids[:, :, None] != rows.document_ids[:, None, :]] = Reason.DOCUMENT
        reasons[np.broadcast_to((query < 0) | (key < 0), reasons.shape)] = Reason.PADDING
        return np.where(self._visible(rows, window), Reason.SEES, reasons).astype(np.uint8)


class AttentionMaskVisualizer(_Visualizer):
    """Shows which tokens see which: `AttentionMaskVisualizer(path)("Do you have mayonnaise recipes?")`.

    The mask comes from the function that attention itself calls: of `backend`, or of the float64 reference.
    `overrides` replace fields of the config: `sliding_window=4` shows another window.
    """

    def __call__(
        self,
        input_sentence: Source,
        suffix: str = "",
        *,
        layer: int | str = "all",
        padding_side: str = "left",
        packed: bool = False,
    ) -> Picture:
        """Print the mask, one matrix for each text and each window among the layers, and return the picture.

        A text (with `suffix` after it), a list of texts, or a chat; several texts are padded, or packed into one row.
        Raises InputError, SequenceTooLongError, and what the tokenizer raises.
        """
        picture = self.picture(
            _with_suffix(input_sentence, suffix), layer=layer, padding_side=padding_side, packed=packed
        )
        _show(picture)
        return picture

    def picture(
        self, source: Source, *, layer: int | str = "all", padding_side: str = "left", packed: bool = False
    ) -> Picture:
        """The same without printing."""
        windows = self.config.layer_windows
        chosen = _among(layer, len(windows), "layer")
        rows = read(self.tokenizer, source, padding_side=padding_side, packed=packed)
        panels = []
        for window in dict.fromkeys(windows[index] for index in chosen):
            layers = tuple(index for index in chosen if windows[index] == window)
            reasons = self._reasons(rows, window)
            for row in range(len(reasons)):
                where = f"text {row}, " if len(reasons) > 1 else ""
                title = f"{where}{_named(layers)}: {_window_named(window, len(reasons[row]))}"
                panels.append(Panel(title, row, layers, window, reasons[row]))
        return Picture(self._title("Attention mask"), rows.tokens, tuple(panels))


class AttentionVisualizer(_Visualizer):
    """Shows how the tokens divide their attention: `AttentionVisualizer(path)("Emma was", layer=0, head="all")`.

    The weights are those that the model of `backend` returns, in float32 unless `dtype` says otherwise, or the
    reference in float64. Without `backend` it is the one whose dtype or device is given, or else the first that is
    installed, or else the reference. `overrides` are also dtype, device and attn_implementation.
    """

    _model: Any = None

    def _chosen(self, backend: str | None, framework: str | None) -> str:
        try:
            return backends.chosen(backend, framework=framework, given=self._loading.values())
        except MissingExtraError:
            if backend is None and framework is None:
                return REFERENCE
            raise

    def __call__(self, source: Source, **options: Any) -> Picture:
        """Print the weights and return the picture; options and errors are those of `picture`."""
        picture = self.picture(source, **options)
        _show(picture)
        return picture

    def picture(
        self,
        source: Source,
        *,
        layer: int | str = -1,
        head: int | str = "mean",
        padding_side: str = "left",
        packed: bool = False,
    ) -> Picture:
        """One matrix for each text, layer and head: a number (from the end if negative) or "all"; heads also "mean".

        Raises InputError, SequenceTooLongError, and what the tokenizer and the model raise.
        """
        layers = _among(layer, self.config.num_hidden_layers, "layer")
        heads: list[int | None] = [None]
        if head != "mean":
            heads = [*_among(head, self.config.num_attention_heads, "head")]
        rows = read(self.tokenizer, source, padding_side=padding_side, packed=packed)
        panels = list(self._panels(rows, self._attentions(rows), layers, heads))
        return Picture(self._title("Attention weights"), rows.tokens, tuple(panels))

    def _panels(
        self, rows: Rows, attentions: list[Array], layers: list[int], heads: list[int | None]
    ) -> Iterator[Panel]:
        windows = self.config.layer_windows
        reasons = {windows[layer]: self._reasons(rows, windows[layer]) for layer in layers}
        several = len(rows.input_ids) > 1
        for row in range(len(rows.input_ids)):
            for layer in layers:
                for head in heads:
                    of_heads = attentions[layer][row]
                    weights = of_heads.mean(axis=0) if head is None else of_heads[head]
                    named = f"mean of {len(of_heads)} heads" if head is None else f"head {head}"
                    title = f"text {row}, " * several + f"layer {layer}, {named}"
                    yield Panel(
                        title, row, (layer,), windows[layer], reasons[windows[layer]][row], head,
                        weights.astype(np.float32),
                    )  # fmt: skip

    def _attentions(self, rows: Rows) -> list[Array]:
        """L arrays [B, N, T, T]."""
        inputs: dict[str, Any] = {"attention_mask": rows.attention_mask, "document_ids": rows.document_ids}
        if self.backend is None:
            if self._model is None:
                loaded = loading.load_pretrained(self.path, "MistralModel", dtype="float32", **self._overrides)
                self._model = dict(loaded.tensors)
            return list(forward(self.config, self._model, rows.input_ids, **inputs).attentions or ())
        if self._model is None:
            kind = self.backend.model_class("MistralModel")
            dtype = {} if {"dtype", "torch_dtype"} & self._loading.keys() else {"dtype": "float32"}
            self._model = kind.from_pretrained(self.path, **dtype, **self._loading, **self._overrides)
        with self.backend.inference(self._model):
            out = self._model(rows.input_ids, output_attentions=True, use_cache=False, **inputs)
        return [np.asarray(self.backend.to_numpy(weights)) for weights in out.attentions]


def _show(picture: Picture) -> None:
    if "ipykernel" not in sys.modules:  # a notebook shows what a cell returns by itself
        picture.print()


def _with_suffix(source: Source, suffix: str) -> Source:
    if not suffix:
        return source
    if not isinstance(source, str):
        raise InputError("suffix: it goes after one text; write it into the texts or messages yourself.")
    return source + suffix


def _among(wanted: int | str, count: int, name: str) -> list[int]:
    """The numbers meant by a number or "all"."""
    wanted = plain_int(wanted)
    if wanted == "all":
        return list(range(count))
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not -count <= wanted < count:
        raise InputError(f"{name} must be a number from 0 to {count - 1}, or 'all', got {wanted!r}.")
    return [wanted % count]


def _named(layers: tuple[int, ...]) -> str:
    """layers 0-3, 5"""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return f"layer{'s' * (len(layers) > 1)} " + ", ".join("-".join(map(str, run)) for run in runs)


def _window_named(window: int | None, tokens: int) -> str:
    if window is None:
        return "no window"
    return f"window of {window}" + (", more than the text has tokens" if window >= tokens else "")
