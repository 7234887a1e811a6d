"""The examples of a file, each made of its line when it is asked for, and what is lost of them by a length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..disk import limits, lines, reading
from ..errors import ExampleError, InputError, MissingLabelsError, TokenizerError
from ..plain import is_int
from ..telling import shown, warn
from ..text.tokenizer import MistralTokenizer
from ..validate import IGNORE
from .formatting import Example, Formatter
from .kinds import KindName, check_kind, check_row, kind_of

LABELLED = ("classification", "tokens")
"""Kinds whose labels are classes, beside or of each token; the others predict the next token."""


class CutExample(NamedTuple):
    """What of a line fits into a length."""

    parts: tuple[Example, ...]
    """One, of a preference two, chosen and rejected; none where the length leaves nothing to learn."""
    lost: int
    """Tokens that are cut off."""

    @property
    def size(self) -> int:
        """The tokens that are left."""
        return sum(len(part.input_ids) for part in self.parts)


class ExampleCounts(NamedTuple):
    """What examples were made of, and what was lost."""

    examples: int = 0
    tokens: int = 0
    """Those that are left."""
    labels: int = 0
    """Those of them that are learnt."""
    cut: int = 0
    """Examples that were longer than the length, dropped ones among them."""
    lost: int = 0
    """Tokens that were cut off them."""
    dropped: int = 0
    """Examples of which the length left nothing to learn."""

    def and_of(self, example: CutExample) -> ExampleCounts:
        """With one more."""
        labels = sum(int((part.labels != IGNORE).sum()) for part in example.parts)
        more = (1, example.size, labels, int(example.lost > 0), example.lost, int(not example.parts))
        return ExampleCounts(*(mine + one for mine, one in zip(self, more, strict=True)))

    def __str__(self) -> str:
        return (
            f"{self.examples} examples, {self.tokens} tokens, {self.labels} of them learnt; {self.cut} cut, "
            f"{self.lost} tokens lost; {self.dropped} dropped, with nothing left to learn"
        )


class Examples:
    """The examples of a .jsonl: `examples[i]` is what of a line fits into `length` tokens, made when it is asked for.

    The kind is told by the fields of the first line, or by `kind`, and every other line must be of it: messages, text,
    prompt and completion, text and label, tokens and labels, or prompt, chosen and rejected. `labels` are the names of
    all classes, or how many there are, for the kinds that have some. Of a longer example the end is cut off; where
    that leaves nothing to learn, it is dropped, of which a warning tells the first time, and `ExampleCounts` always.

    A line that is no example raises ExampleError (an InputError), which names the file and the line, when it is asked
    for. Raises InputError, TokenizerError, EmptyInputError for a file without a line, and what reading raises.
    """

    def __init__(
        self,
        path: reading.PathLike,
        tokenizer: MistralTokenizer,
        *,
        length: int,
        kind: KindName | None = None,
        labels: Sequence[str] | int | None = None,
    ) -> None:
        if not is_int(length) or length < 2:
            raise InputError(f"length must be an integer from 2 on, got {shown(length)}.")
        if not isinstance(tokenizer, MistralTokenizer):
            raise InputError(f"tokenizer must be a MistralTokenizer, got {type(tokenizer).__name__}; load one.")
        self.lines, self.length, self.tokenizer = lines.JsonLines(path, error=ExampleError), length, tokenizer
        if not len(self.lines):
            raise MissingLabelsError(f"{self.lines.path} must have an example a line, got none.")
        self.kind: KindName = kind_of(self.lines[0], self.lines.where(0)) if kind is None else check_kind(kind)
        if self.kind in LABELLED:
            classes = _classes(labels, self.kind)
        elif labels is not None:
            raise InputError(
                f"labels: the lines of {self.lines.path} are of the kind {self.kind}, without; leave it out."
            )
        else:
            classes = ()
            if tokenizer.eos_token_id is None:
                raise TokenizerError("eos_token must end what is learnt, and the tokenizer has none; assign it.")
        numbers = {name: number for number, name in enumerate(classes)}
        self._formatter, self._has_warned = Formatter(tokenizer, numbers), False

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> CutExample:
        where, row = self.lines.where(index), self.lines[index]
        check_row(row, self.kind, where)
        whole = self._formatter.examples(row, self.kind, where, self.lines.number(index))
        found = [self._cut(example) for example in whole]
        lost = sum(len(before.input_ids) - len(after.input_ids) for before, after in zip(whole, found, strict=True))
        if all((example.labels != IGNORE).any() for example in found):
            return CutExample(tuple(found), lost)
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"{where}: {max(len(example.input_ids) for example in whole)} tokens, of which the first {self.length} "
                "leave nothing to learn; it is dropped, as others like it will be. A larger length keeps it."
            )
        return CutExample((), sum(len(example.input_ids) for example in whole))

    @property
    def sizes(self) -> Array:
        """The tokens that are left of each example [N], 0 of a dropped one: all are formatted once, and let go."""
        return self._read_once[0]

    def counts(self, indices: Iterable[int] | None = None) -> ExampleCounts:
        """What all examples, or some, are made of and what the length takes of them; they are formatted for it."""
        if indices is None:
            return self._read_once[1]
        found = ExampleCounts()
        for index in indices:
            found = found.and_of(self[index])
        return found

    @cached_property
    def _read_once(self) -> tuple[Array, ExampleCounts]:
        sizes, counts = np.zeros(len(self), np.int64), ExampleCounts()
        for index in range(len(self)):
            example = self[index]
            sizes[index], counts = example.size, counts.and_of(example)
        return sizes, counts

    def _cut(self, example: Example) -> Example:
        """An example of at most the length, its end cut off; a classified one keeps the special tokens of its end."""
        if len(example.input_ids) <= self.length:
            return example
        after = self.tokenizer.frame.after if self.kind in LABELLED else []
        after = after[: self.length - 1]
        keep = self.length - len(after)
        labels = example.labels
        if self.kind != "classification":
            labels = np.concatenate([labels[:keep], np.full(len(after), IGNORE)])
        return Example(np.concatenate([example.input_ids[:keep], np.array(after, np.int64)]), labels, example.line)


def kind_of_file(path: reading.PathLike) -> KindName:
    """The kind of a .jsonl, by its first line. Raises MissingLabelsError for a file without one, ExampleError."""
    with lines.JsonLines(path, error=ExampleError) as rows:
        if not len(rows):
            raise MissingLabelsError(f"{rows.path} must have an example a line, got none.")
        return kind_of(rows[0], rows.where(0))


def label_names(path: reading.PathLike) -> list[str]:
    """The classes of a .jsonl of classified texts or tokens: its names, sorted, or LABEL_0 and so on to the highest.

    Every line is read once. Raises ExampleError for a line of another kind, and where numbers and names are mixed.
    """
    names: set[str] = set()
    highest = -1
    with lines.JsonLines(path, error=ExampleError) as rows:
        kind = kind_of(rows[0], rows.where(0)) if len(rows) else None
        if kind not in LABELLED:
            raise ExampleError(f"{rows.path} must have lines of text and label, or tokens and labels, got {kind}.")
        for index in range(len(rows)):
            where, row = rows.where(index), rows[index]
            check_row(row, kind, where)
            for label in [row["label"]] if kind == "classification" else row["labels"]:
                if isinstance(label, str):
                    names.add(label)
                elif is_int(label) and label >= 0:
                    highest = max(highest, label)
                elif kind == "classification" or label not in (None, IGNORE):
                    raise ExampleError(f"{where}: a label must be a name or a number from 0 on, got {shown(label)}.")
            if names and highest >= 0:
                raise ExampleError(f"{where}: the labels must all be names or all numbers, got both; choose one.")
            limits.check(max(len(names), highest + 1), limits.LABELS, what="classes", where=where)
    return sorted(names) or [f"LABEL_{number}" for number in range(highest + 1)]


def _classes(labels: Any, kind: str) -> tuple[str, ...]:
    if is_int(labels) and 0 < labels <= limits.LABELS:
        return tuple(f"LABEL_{number}" for number in range(labels))
    names = tuple(labels) if isinstance(labels, list | tuple) else ()
    if names and all(isinstance(name, str) for name in names) and len(set(names)) == len(names) <= limits.LABELS:
        return names
    raise InputError(
        f"labels must be a list of the names of all classes, each once, or how many there are, for the kind {kind}, "
        f"got {shown(labels)}; label_names(path) finds them in a file, and a model's config has them in id2label."
    )
