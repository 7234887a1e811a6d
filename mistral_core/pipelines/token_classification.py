"""Which class each token of a text belongs to, and the entities that they make."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import InputError, SequenceTooLongError
from .base import Pipeline, Text, Window, check_count, check_one_of, encoded, softmax, stitched, windows

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class TokenClassificationOptions:
    """What a call takes."""

    aggregation_strategy: str = "none"
    ignore_labels: Sequence[str] = ("O",)
    stride: int | None = None
    max_length: int | None = None
    is_split_into_words: bool = False
    delimiter: str = " "

    def __post_init__(self) -> None:
        check_one_of("aggregation_strategy", self.aggregation_strategy, STRATEGIES)
        check_count("stride", self.stride, low=0, or_none=True)
        check_count("max_length", self.max_length, or_none=True)
        if isinstance(self.ignore_labels, str):
            raise InputError(f"ignore_labels must be a list of labels, got {self.ignore_labels!r}.")


class Document(NamedTuple):
    """A text, its tokens, the number of the word that each is of, and the rows it is read in."""

    text: str
    tokens: Text
    words: list[int]
    parts: list[Window]


class Unit(NamedTuple):
    """A token or a word and what it was found to be."""

    label: str
    score: float
    begin: int
    end: int


class TokenClassificationPipeline(Pipeline):
    """The entities of a text: `{"entity_group": ..., "score": ..., "word": ..., "start": ..., "end": ...}` each.

    By default, `aggregation_strategy="none"`, its tokens: `{"entity": ..., "score", "index", "word", "start", "end"}`.
    "simple" puts neighbours of one label together, a `B-` beginning anew; "first", "average" and "max" first give all
    tokens of a word one label: that of its first token, of the mean of scores, of the highest one. Words stand
    between blanks, or are given one by one with `is_split_into_words` and joined by `delimiter`. Entities in
    `ignore_labels` are left out. With `stride`, a long text is read in rows of `max_length` tokens (all positions of
    the model) that have so many in common.

    Other than in transformers, `start` and `end` leave blanks out: `text[start:end]` is the word. Of common tokens the
    row counts that sees more before them, and entities are put together afterwards, so none is cut in two. A text
    too long for one row is an error without `stride`, not cut off. Only `B-` and `I-` are taken off a label.
    """

    task = "token-classification"
    architecture = "MistralForTokenClassification"
    options_class = TokenClassificationOptions
    _expected = "a str, with is_split_into_words a list of them,"

    def _is_one(self, inputs: Any, options: TokenClassificationOptions) -> bool:
        words = options.is_split_into_words and isinstance(inputs, list | tuple) and inputs
        return isinstance(inputs, str) or bool(words and isinstance(inputs[0], str))

    def _batch(self, items: list[Any], options: TokenClassificationOptions, size: int) -> list[list[dict[str, Any]]]:
        documents = [self._document(item, options) for item in items]
        rows = [part.row for document in documents for part in document.parts]
        outputs = iter(self._outputs(rows, ["logits"], size))
        logits = [stitched(each.parts, [next(outputs)[0] for _ in each.parts]) for each in documents]
        return [self._entities(*each, options) for each in zip(documents, logits, strict=True)]

    def _document(self, item: Any, options: TokenClassificationOptions) -> Document:
        if options.is_split_into_words:
            text, tokens, words = self._joined(item, options.delimiter)
        else:
            text, tokens = item, encoded(self.tokenizer, item)
            words = word_numbers(text, tokens.spans)
        longest = options.max_length or self.model.config.max_position_embeddings
        length = len(tokens.before) + len(tokens.ids) + len(tokens.after)
        if length > longest and options.stride is None:
            raise SequenceTooLongError(
                f"{self.task}: a text must be of at most {longest} tokens, got {length}; give a stride to read it in "
                "rows that overlap."
            )
        return Document(text, tokens, words, windows(tokens, longest, options.stride or 0))

    def _joined(self, words: Any, delimiter: str) -> tuple[str, Text, list[int]]:
        """The text of words that are tokenized one by one, its tokens, and the word of each."""
        if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
            raise InputError(
                f"{self.task}: with is_split_into_words a text must be a list of words, got {words!r:.80}."
            )
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        numbers: list[int] = []
        start = 0
        for number, word in enumerate(words):
            tokens = encoded(self.tokenizer, word)
            ids += tokens.ids
            spans += [(start + begin, start + end) for begin, end in tokens.spans]
            numbers += [number] * len(tokens.ids)
            start += len(word) + len(delimiter)
        around = encoded(self.tokenizer, words[0])
        return delimiter.join(words), Text(around.before, ids, around.after, spans), numbers

    def _entities(
        self, document: Document, logits_TC: Array, options: TokenClassificationOptions
    ) -> list[dict[str, Any]]:
        scores = softmax(logits_TC)
        labels = self.model.config.id2label
        if options.aggregation_strategy == "none":
            return self._tokens(document, scores, options)
        units = found(scores, document.tokens.spans, document.words, labels, options.aggregation_strategy)
        return [
            {"entity_group": label, "score": score, "word": document.text[begin:end], "start": begin, "end": end}
            for label, score, begin, end in grouped(units)
            if label not in options.ignore_labels
        ]

    def _tokens(
        self, document: Document, scores_TC: Array, options: TokenClassificationOptions
    ) -> list[dict[str, Any]]:
        text, tokens, _, _ = document
        names = self.tokenizer.convert_ids_to_tokens(tokens.ids)
        units = found(scores_TC, tokens.spans, document.words, self.model.config.id2label, "none")
        return [
            {
                "entity": label,
                "score": score,
                "index": len(tokens.before) + at,
                "word": text[begin:end] if tokens.ids[at] == self.tokenizer.unk_token_id else names[at],
                "start": begin,
                "end": end,
            }
            for at, (label, score, begin, end) in enumerate(units)
            if label not in options.ignore_labels
        ]


def word_numbers(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Which word, counted from 1 and told by blanks, each span of characters is of; of blanks alone, the next one."""
    begins = [i for i, char in enumerate(text) if not char.isspace() and (i == 0 or text[i - 1].isspace())]
    return [bisect_right(begins, begin) + text[begin : begin + 1].isspace() for begin, _ in spans]


def found(
    scores_TC: Array, spans: Sequence[tuple[int, int]], words: Sequence[int], labels: Any, strategy: str
) -> list[Unit]:
    """Each token, or by a strategy that asks for words each word, with its label and the label's score."""
    by_token = strategy in ("none", "simple")
    groups = groupby(range(len(spans)), key=(lambda at: at) if by_token else words.__getitem__)
    units = []
    for _, members in groups:
        ats = list(members)
        scores_C = _of_word(scores_TC[ats], strategy)
        best = int(scores_C.argmax())
        units.append(Unit(labels[best], float(scores_C[best]), *extent([spans[at] for at in ats])))
    return units


def _of_word(scores_TC: Array, strategy: str) -> Array:
    if strategy == "average":
        return np.asarray(scores_TC.mean(axis=0))
    return np.asarray(scores_TC[scores_TC.max(axis=1).argmax() if strategy == "max" else 0])


def grouped(units: Iterable[Unit]) -> list[Unit]:
    """Neighbours of one label as one, its prefix off and its score their mean; a `B-` label starts a new span."""
    groups: list[list[Unit]] = []
    for unit in units:
        if groups and _tag(groups[-1][-1].label) == _tag(unit.label) and not unit.label.startswith("B-"):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [
        Unit(
            _tag(group[0].label),
            float(np.mean([unit.score for unit in group])),
            *extent([(unit.begin, unit.end) for unit in group]),
        )
        for group in groups
    ]


def extent(spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """From where the first of some spans begins to where the last one ends, empty ones left out."""
    solid = [span for span in spans if span[0] < span[1]] or spans[:1]
    return solid[0][0], solid[-1][1]


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
