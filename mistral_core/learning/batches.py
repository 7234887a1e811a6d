"""Batches: rows of examples as arrays, and the steps of an optimizer that they are put together to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..validate import IGNORE
from .formatting import Example

ExampleRow = tuple[Example, ...]
"""The examples in one row of a batch, in their order."""


class Batch(NamedTuple):
    """Arrays for one call of a model, under the names of its arguments; all int64.

    Of preferences the first half of the rows are the chosen answers and the second half the rejected ones, in the
    same order. A row that nothing is left for is all padding, without a label, so that every batch has one shape.
    """

    input_ids: Array
    """[B, T], padded on the right."""
    labels: Array
    """[B, T], IGNORE where nothing is learnt; of classified texts [B]."""
    attention_mask: Array | None
    """[B, T], of rows of one example."""
    document_ids: Array | None
    """[B, T], of packed rows: the number of the example in its row, of padding the next one."""
    lines: tuple[tuple[int, ...], ...]
    """The numbers of the lines in each row, to tell which examples a bad loss is of."""

    @property
    def tokens(self) -> int:
        """Those that are no padding."""
        if self.attention_mask is not None:
            return int(self.attention_mask[[row for row, lines in enumerate(self.lines) if lines]].sum())
        assert self.document_ids is not None
        examples = np.array([len(lines) for lines in self.lines])
        return int((self.document_ids < examples[:, None]).sum())

    def arguments(self) -> dict[str, Array]:
        """The arrays that are there, for `model(**batch.arguments())`."""
        names = ("input_ids", "labels", "attention_mask", "document_ids")
        return {name: array for name in names if (array := getattr(self, name)) is not None}


class LearningStep(NamedTuple):
    """The batches whose gradients are added up before the optimizer moves the weights."""

    batches: tuple[Batch, ...]
    num_items_in_batch: int
    """What the sum of losses over all of the batches is divided by: the labels that count, or of preferences the pairs.

    Where the next token is predicted, the first label of each example is IGNORE: that of a row counts in no loss, and
    no packed example predicts the first token of the next one.
    """
    epoch: int
    """From 0."""


def batch_of(rows: Sequence[ExampleRow], *, size: int, length: int, padding_id: int, packed: bool) -> Batch:
    """Rows as arrays [size, length], those that are missing filled with padding."""
    shape = size, length
    ids, labels = np.full(shape, padding_id, np.int64), np.full(shape, IGNORE, np.int64)
    marks = np.zeros(shape, np.int64)
    marks[len(rows) :, : 0 if packed else 1] = 1  # a row must not be without a token
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples):
            end = at + len(example.input_ids)
            ids[row, at:end], labels[row, at:end] = example.input_ids, example.labels
            marks[row, at:end] = number if packed else 1
            at = end
        if packed:
            marks[row, at:] = len(examples)
    if any(example.labels.ndim == 0 for examples in rows for example in examples):
        classes = [int(example.labels) for examples in rows for example in examples]
        labels = np.array(classes + [IGNORE] * (size - len(rows)), np.int64)
    lines = tuple(tuple(example.line for example in examples) for examples in rows)
    return Batch(ids, labels, None if packed else marks, marks if packed else None, lines + ((),) * (size - len(rows)))
