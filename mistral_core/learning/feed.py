"""Feed: the steps of a training, from examples in the order of a seed, and where they stand, to go on from there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import InputError, MissingLabelsError
from ..plain import is_int
from ..telling import shown
from ..validate import IGNORE
from .batches import Batch, ExampleRow, LearningStep, batch_of
from .examples import CutExample, ExampleCounts, Examples
from .order import SEEDS, permutation
from .packing import best_fit, windows

WINDOW_ROWS = 128
"""Rows' worth of tokens that are packed at once: of each so many, at most the last row but few is not full."""
UNPACKED = ("classification", "preference")
"""Kinds of which a row holds one example: a class is read off a row's last token, and answers are compared by pairs."""
PAD_TO = 64
"""Rows that are padded have a multiple of so many columns, so that a compiler sees few shapes."""
FIRST_TOKENS = 64
"""So many tokens of the first example tell a state that the tokenizer is another one."""


class FeedPosition(NamedTuple):
    """What comes next: a row of the examples that are packed together from a place in an epoch's order on."""

    epoch: int = 0
    place: int = 0
    row: int = 0
    counts: tuple[int, ...] = tuple(ExampleCounts())
    """Of the epoch's examples before the place."""


class Feed:
    """The steps of a training: `for step in feed.steps(epochs=3)`, each of `accumulate` batches of `rows` rows.

    Rows are packed with several examples, told apart by `document_ids`, where the kind allows it, or hold one each and
    are padded with `pack=False`, to the longest of the batch and a multiple of `pad_to_multiple_of`. Each epoch has an
    order of its own, drawn with `seed` (`order.permutation`), or the file's with `shuffle=False`. An epoch's last step
    may have fewer batches, and its last batch rows that are padding.

    `state()` after a step is a small JSON value, with which `restore` goes on in another process: the steps that follow
    are the same to the bit. `counts` says what the examples read in this epoch were made of, and what was lost.
    Examples are read and formatted when they are needed: in memory are those of WINDOW_ROWS rows.

    Raises InputError for arguments, MissingLabelsError where no example has anything left to learn.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        rows: int,
        accumulate: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        pack: bool | None = None,
        pad_to_multiple_of: int = PAD_TO,
    ) -> None:
        for name, value in (("rows", rows), ("accumulate", accumulate), ("pad_to_multiple_of", pad_to_multiple_of)):
            if not is_int(value) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {shown(value)}.")
        if not is_int(seed) or not 0 <= seed < SEEDS:
            raise InputError(f"seed must be an integer from 0 to 2^64 - 1, got {shown(seed)}.")
        if pack and examples.kind in UNPACKED:
            raise InputError(
                f"pack must be False for the kind {examples.kind}, of which a row holds one; leave it out."
            )
        self.examples, self.rows, self.accumulate, self.seed, self.shuffle = examples, rows, accumulate, seed, shuffle
        self.pack = examples.kind not in UNPACKED if pack is None else pack
        self.pad_to_multiple_of, self.counts, self._position = pad_to_multiple_of, ExampleCounts(), FeedPosition()

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next step is of, from 0; at an epoch's end that one's still."""
        return self._position.epoch

    def steps(self, *, epochs: int | None = None) -> Iterator[LearningStep]:
        """The steps from where the feed stands to the end of so many epochs in all, or without end."""
        while epochs is None or self._position.epoch < epochs:
            rows, epoch = self._rows(self._position), self._position.epoch
            while taken := list(islice(rows, self.rows * self.accumulate)):
                self._position = taken[-1][1]
                batches = [
                    self._batch([row for row, _ in taken[at : at + self.rows]])
                    for at in range(0, len(taken), self.rows)
                ]
                yield LearningStep(tuple(batches), sum(map(self._items, batches)), epoch)
            if self._position == FeedPosition(epoch):
                raise MissingLabelsError(
                    f"{self.examples.lines.path}: of every example the first {self.examples.length} tokens leave "
                    "nothing to learn; take a larger length."
                )
            self._position = FeedPosition(epoch + 1)

    def count_steps(self, *, epochs: int = 1) -> int:
        """The steps of so many epochs from the beginning; all examples are formatted once, to know their sizes."""
        return sum(self.steps_by_epoch(epochs))

    def steps_by_epoch(self, epochs: int) -> list[int]:
        """The steps of each of so many epochs; where examples are packed, one may have more than another."""
        return [-(-self._count_rows(epoch) // (self.rows * self.accumulate)) for epoch in range(epochs)]

    def _count_rows(self, epoch: int) -> int:
        sizes, rows = self.examples.sizes[self._order(epoch)], 0
        for window in windows(((int(size), int(size)) for size in sizes), self._room):
            kept = [size for size in window if size]
            rows += len(best_fit(kept, self.examples.length)) if self.pack else len(kept)
        return rows

    def state(self) -> dict[str, Any]:
        """Where the feed stands and of what, as a JSON value."""
        return {**self._position._asdict(), "counts": list(self._position.counts), "of": self._what()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, in `steps` that are called afterwards.

        Raises InputError for what is no state, or one of other examples, lengths, orders or rows; `rows` and
        `accumulate` may be others.
        """
        names = (*FeedPosition._fields, "of")
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise InputError(f"state must be what `state()` gave, with {', '.join(names)}, got {shown(state)}.")
        what = self._what()
        other = state["of"] if isinstance(state["of"], Mapping) else {}
        if changed := [name for name, value in what.items() if other.get(name) != value]:
            told = "; ".join(f"{name} {shown(other.get(name))} then, {shown(what[name])} now" for name in changed)
            raise InputError(f"state must be of the same feed, got one of another: {told}.")
        counts = state["counts"]
        numbers = [
            *(state[name] for name in FeedPosition._fields[:3]),
            *(counts if isinstance(counts, list) else [None]),
        ]
        if not all(is_int(each) and each >= 0 for each in numbers) or len(counts) != len(ExampleCounts._fields):
            raise InputError(f"state must hold numbers from 0 on, got {shown(state)}.")
        if state["place"] > len(self.examples):
            raise InputError(f"state: place must be at most {len(self.examples)}, got {state['place']}.")
        self._position = FeedPosition(state["epoch"], state["place"], state["row"], tuple(counts))
        self.counts = ExampleCounts(*counts)

    @property
    def _room(self) -> int:
        """The tokens of examples that are made rows of at once."""
        return WINDOW_ROWS * self.examples.length if self.pack else 1

    def _what(self) -> dict[str, Any]:
        """All that decides which rows there are, and in which order."""
        return {
            "sha256": self.examples.lines.sha256,
            "kind": self.examples.kind,
            "length": self.examples.length,
            "first": self._first,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "pack": self.pack,
            "window": WINDOW_ROWS,
        }

    @cached_property
    def _first(self) -> list[int]:
        """The first tokens of the first example, of which another tokenizer or chat format has others."""
        return [int(each) for part in self.examples[0].parts for each in part.input_ids[:FIRST_TOKENS]]

    def _order(self, epoch: int) -> Array:
        size = len(self.examples)
        return permutation(size, seed=self.seed, path=(epoch,)) if self.shuffle else np.arange(size)

    def _rows(self, start: FeedPosition) -> Iterator[tuple[ExampleRow, FeedPosition]]:
        """The rows from a position to the end of its epoch, with the position after each; counts what they are of."""
        place, row, self.counts = start.place, start.row, ExampleCounts(*start.counts)
        cut = map(self.examples.__getitem__, map(int, self._order(start.epoch)[place:]))
        for window in windows(((each, each.size) for each in cut), self._room):
            before = tuple(self.counts)
            for each in window:
                self.counts = self.counts.and_of(each)
            rows = self._packed([each for each in window if each.parts])
            if self.shuffle:
                rows = [rows[at] for at in permutation(len(rows), seed=self.seed, path=(start.epoch, place))]
            for number in range(row, len(rows)):
                yield rows[number], FeedPosition(start.epoch, place, number + 1, before)
            place, row = place + len(window), 0

    def _packed(self, window: list[CutExample]) -> list[ExampleRow]:
        """The rows of some examples; of preferences the pairs."""
        if not self.pack:
            return [each.parts for each in window]
        rows = best_fit([each.size for each in window], self.examples.length)
        return [tuple(window[at].parts[0] for at in row) for row in rows]

    def _batch(self, rows: list[ExampleRow]) -> Batch:
        longest = max(len(example.input_ids) for row in rows for example in row)
        multiple = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        length = self.examples.length if self.pack else min(multiple, self.examples.length)
        make = partial(
            batch_of, size=self.rows, length=length, padding_id=self.examples.tokenizer.padding_id, packed=self.pack
        )
        if self.examples.kind != "preference":
            return make(rows)
        chosen, rejected = (make([(pair[which],) for pair in rows]) for which in (0, 1))
        joined = {
            name: np.concatenate([array, rejected.arguments()[name]]) for name, array in chosen.arguments().items()
        }
        return Batch(**joined, document_ids=None, lines=chosen.lines + rejected.lines)

    def _items(self, batch: Batch) -> int:
        pairs = self.examples.kind == "preference"
        return sum(map(len, batch.lines)) // 2 if pairs else int((batch.labels != IGNORE).sum())
