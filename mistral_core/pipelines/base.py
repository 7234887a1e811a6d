"""What all pipelines share: items in, rows through the model in batches, results out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..arrays import Array
from ..backend import Backend
from ..errors import EmptyInputError, InputError
from ..hub.download import ARGUMENTS
from ..plain import is_int, plain
from ..telling import nearest, shown
from ..validate import check_call

LOADING = (
    *ARGUMENTS, "config", "dtype", "torch_dtype", "device", "device_map", "attn_implementation", "trust_remote_code",
)  # fmt: skip
"""Arguments of `pipeline` that go to `from_pretrained`."""
NARROWEST_COLUMNS = 32
"""Columns of the narrowest batch where shapes are compiled; wider ones are powers of two."""


class Pipeline:
    """A task: a model, its tokenizer, and what stands between them and plain Python; call it."""

    task: ClassVar[str]
    architecture: ClassVar[str]
    options_class: ClassVar[type]
    """The options of a call with their defaults, a frozen dataclass that checks itself."""

    def __init__(self, model: Any, tokenizer: Any, backend: Backend, *, batch_size: int = 1, **options: Any) -> None:
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.batch_size = _checked_size(batch_size)
        self._defaults: Any = self.options_class()
        self._defaults = self._chosen(options)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result of one input; of a list a list; of any other iterable an iterator, results as they come.

        `options` come before those the pipeline was made with. `batch_size` is how many rows the model gets at once;
        it changes the speed and no result. Raises InputError, TokenizerError and their kind.
        """
        if hasattr(inputs, "dtype") and hasattr(inputs, "shape"):  # a column of a table, an array of texts
            inputs = plain(inputs)
        chosen, size = self._chosen(options), self.batch_size if batch_size is None else _checked_size(batch_size)
        if self._is_one(inputs, chosen):
            return self._of_one(inputs, next(self._results([inputs], chosen, size)), chosen)
        if not isinstance(inputs, Iterable):
            raise InputError(
                f"{self.task} must be given {self._expected}, or several of it, got {type(inputs).__name__}."
            )
        results = self._results(inputs, chosen, size)
        return list(results) if isinstance(inputs, list | tuple) else results

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model and tokenizer into a directory that `pipeline` loads again."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(Path(directory))

    def __repr__(self) -> str:
        return f"pipeline({self.task!r}, model={type(self.model).__name__}, backend={self.backend.name!r})"

    # What a task says of itself

    _expected: ClassVar[str] = "a str"

    def _is_one(self, inputs: Any, options: Any) -> bool:
        return isinstance(inputs, str)

    def _of_one(self, item: Any, result: Any, options: Any) -> Any:
        return result

    def _batch(self, items: list[Any], options: Any, size: int) -> Iterable[Any]:
        """The results of some items."""
        raise NotImplementedError

    def _chosen(self, given: Mapping[str, Any]) -> Any:
        """The options in force; raises InputError for names that are none."""
        check_names(self.task, given, {field.name for field in dataclasses.fields(self.options_class)})
        return dataclasses.replace(self._defaults, **{name: plain(value) for name, value in given.items()})

    # The model

    def _results(self, inputs: Iterable[Any], options: Any, size: int) -> Iterator[Any]:
        items = iter(inputs)
        while batch := list(islice(items, size)):
            yield from self._batch(batch, options, size)

    def _outputs(self, rows: Sequence[list[int]], fields: Sequence[str], size: int) -> list[tuple[Array, ...]]:
        """For each row of ids, the model's outputs of these names in float64; columns beyond the row are padding."""
        found: list[tuple[Array, ...]] = []
        for start in range(0, len(rows), size):
            part = list(rows[start : start + size])
            ids_BT, mask_BT = padded(part, side="right", rows_at_least=size if self.backend.fixed_shapes else None)
            check_call(self.model.config, input_ids=ids_BT, attention_mask=mask_BT)  # compiled functions do not
            out = self.backend.forward(self.model, input_ids=ids_BT, attention_mask=mask_BT)
            arrays = [np.asarray(self.backend.to_numpy(out[field]), np.float64) for field in fields]
            found += [tuple(array[row] for array in arrays) for row in range(len(part))]
        return found


def check_names(task: str, given: Iterable[str], known: Iterable[str], others: str = "") -> None:
    """Raise InputError for options that a task does not have, naming the nearest, or all where there are few."""
    known = sorted(known)
    unknown = sorted(set(given) - set(known))
    if unknown:
        told = ", ".join(f"{name!r}{nearest(name, [*known, *LOADING])}" for name in map(str, unknown))
        has = f"it has {', '.join(known)}" if len(known) <= FEW_OPTIONS else "help() of the pipeline lists them"
        raise InputError(f"{task} has no option {told}; {has}{others}.")


FEW_OPTIONS = 12
"""So many names are still read in a message."""


def check_count(name: str, value: Any, *, low: int = 1, or_none: bool = False) -> None:
    """Raise InputError for an option that is not an integer of `low` or more."""
    if not (or_none and value is None) and not (is_int(value) and value >= low):
        raise InputError(
            f"{name} must be an integer of {low} or more{' or None' if or_none else ''}, got {shown(value)}."
        )


def check_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise InputError for an option that is none of some."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}, got {shown(value)}.")


def _checked_size(size: Any) -> int:
    size = plain(size)
    check_count("batch_size", size)
    return int(size)


def padded(rows: Sequence[list[int]], *, side: str, rows_at_least: int | None = None) -> tuple[Array, Array]:
    """Ids and mask, int64 [B, T], of rows of ids padded on a side; what pads is never seen.

    With `rows_at_least`, for compiled shapes, the last row is repeated up to so many and T is one of few. Raises
    EmptyInputError.
    """
    if not rows or not all(rows):
        raise EmptyInputError("a text without a single token; leave it out.")
    width = max(map(len, rows))
    if rows_at_least is not None:
        width = max(NARROWEST_COLUMNS, 1 << (width - 1).bit_length())
        rows = [*rows, *[rows[-1]] * (rows_at_least - len(rows))]
    ids_BT = np.zeros((len(rows), width), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for index, row in enumerate(rows):
        where = slice(len(row)) if side == "right" else slice(width - len(row), None)
        ids_BT[index, where], mask_BT[index, where] = row, 1
    return ids_BT, mask_BT


def softmax(logits: Array, axis: int = -1) -> Array:
    """exp(x) over its sum along an axis."""
    powers = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


# Texts in windows


class Text(NamedTuple):
    """A text as tokens, with what stands around it: special tokens, a question."""

    before: list[int]
    ids: list[int]
    after: list[int]
    spans: list[tuple[int, int]]
    """The characters of each token of the text, the blanks around them left out."""


class Window(NamedTuple):
    """Some tokens of a text, with what stands around it: a row of the model."""

    row: list[int]
    first: int
    """The column of the first of them."""
    begin: int
    """Which token of the text that is."""
    end: int


def encoded(tokenizer: Any, text: str, *, question: str | None = None, longest_question: int | None = None) -> Text:
    """The tokens of a text, alone or after a question's first tokens, joined as the tokenizer joins two texts."""
    first, second = (text, None) if question is None else (question, text)
    made = tokenizer(first, second, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, special = list(made["input_ids"]), made["special_tokens_mask"]
    own = [column for column, is_special in enumerate(special) if not is_special]
    asked = 0 if question is None else len(tokenizer.encode(question, add_special_tokens=False))
    cut = set(own[:asked][longest_question:]) if longest_question is not None else set()
    begin, end = (own[asked], own[-1] + 1) if len(own) > asked else (len(ids), len(ids))
    before = [token for column, token in enumerate(ids[:begin]) if column not in cut]
    spans = [trimmed(text, *map(int, span)) for span in made["offset_mapping"][begin:end]]
    return Text(before, ids[begin:end], ids[end:], spans)


def trimmed(text: str, begin: int, end: int) -> tuple[int, int]:
    """A span of characters without the blanks around it; of blanks alone, nothing at their end."""
    part = text[begin:end]
    begin = end - len(part.lstrip())
    return begin, max(begin, end - len(part) + len(part.rstrip()))


def windows(text: Text, length: int, stride: int) -> list[Window]:
    """A text cut into rows of at most `length` tokens of which `stride` are those of the row before.

    Raises InputError where nothing of the text would fit.
    """
    room = length - len(text.before) - len(text.after)
    if room < len(text.ids) and not 0 <= stride < room:
        raise InputError(
            f"rows of {length} tokens, {len(text.before) + len(text.after)} of them around the text, have room for "
            f"{room}, but {stride} overlap; make them longer or the overlap smaller."
        )
    begins = [0, *range(room - stride, len(text.ids) - stride, max(room - stride, 1))] if room < len(text.ids) else [0]
    cuts = [(begin, min(begin + room, len(text.ids))) for begin in begins]
    return [Window([*text.before, *text.ids[a:b], *text.after], len(text.before), a, b) for a, b in cuts]


def stitched(parts: Sequence[Window], arrays: Sequence[Array]) -> Array:
    """What the model says [T, ...] of a text's tokens, each read in the first row that holds it: it sees most there."""
    ends = [0, *(part.end for part in parts)]
    return np.concatenate(
        [
            array[part.first + have - part.begin : part.first + part.end - part.begin]
            for part, have, array in zip(parts, ends, arrays, strict=False)
        ]
    )
