"""What ends a row of new tokens, and rows of unequal length as columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import GenerationConfigError
from ..text.stream import StoppingStream
from .engine import Engine, Prompt


class Ending:
    """What ends a row: its count, an end of sequence, a stop string in its new text, a caller's function."""

    def __init__(self, engine: Engine, prompt: Prompt, rows: list[list[int]], tokenizer: Any) -> None:
        generation = prompt.generation
        self.generation, self.engine, self.hooks = generation, engine, prompt.hooks
        self.most, self.ids = generation.max_new_tokens, generation.eos_token_ids
        self.given = np.repeat(prompt.ids, generation.num_return_sequences, axis=0)
        self.prompts = [len(row) for row in rows]
        self.texts = stop_streams(tokenizer, generation.stops, rows)
        self.scores: list[Any] = []

    def ids_so_far(self, rows: list[list[int]]) -> Array:
        """[B, T + new]: the prompt as given and what was made, ended rows padded."""
        made = [row[start:] for row, start in zip(rows, self.prompts, strict=True)]
        new = max(map(len, made))
        return np.column_stack([self.given, *(column(made, c, self.generation.padding) for c in range(new))])

    def ask(self, rows: list[list[int]], ended: list[bool], step_scores: list[list[Array]]) -> None:
        """Ask the caller's functions which rows end, once for a step."""
        if not self.hooks.criteria:
            return
        scores = None
        if self.generation.output_scores:
            size, padding = self.engine.config.vocab_size, self.generation.padding
            self.scores += map(self.engine.array, score_columns(step_scores, 1, size, padding))
            scores = tuple(self.scores)
        found = self.hooks.stopped(self.engine, self.ids_so_far(rows), scores)
        ended[:] = [over or bool(new) for over, new in zip(ended, found, strict=True)]

    def made(self, index: int, row: list[int]) -> int:
        """How many new tokens a row has."""
        return len(row) - self.prompts[index]

    def left(self, index: int, row: list[int]) -> int:
        """How many more it may have."""
        return self.most - self.made(index, row)

    def ends(self, index: int, row: list[int]) -> bool:
        """Whether the last token of a row ends it; asked once for each."""
        if self.texts:
            self.texts[index].push(row[-1])
        stopped = bool(self.texts) and self.texts[index].stopped
        return stopped or row[-1] in self.ids or self.left(index, row) <= 0


def stop_streams(tokenizer: Any, stops: tuple[str, ...], rows: list[list[int]]) -> list[StoppingStream]:
    """What looks for stop strings in the new text of each row, if there are any; raises GenerationConfigError."""
    if stops and tokenizer is None:
        raise GenerationConfigError("stop_strings: they are looked for in text; give generate tokenizer=... too.")
    return [StoppingStream(tokenizer, stops, after=row, skip_special_tokens=False) for row in rows] if stops else []


def column(made: list[list[int]], column: int, padding: int) -> Array:
    return np.array([row[column] if column < len(row) else padding for row in made], np.int64)


def score_columns(scores: list[list[Array]], new: int, size: int, padding: int) -> tuple[Array, ...]:
    """[B, V] for each new column; of an ended row, padding is certain."""
    certain = np.full(size, -np.inf, np.float32)
    certain[padding] = 0
    return tuple(
        np.stack([row[c] if c < len(row) else certain for row in scores], dtype=np.float32) for c in range(new)
    )
