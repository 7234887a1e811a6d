"""Guesses of the next tokens, which one step of the model then judges at once.

Nothing is lost: at each place the model chooses its own token, with the noise of that row and step, and a guess only
counts where it is the same. So the tokens are those of plain decoding. An assistant that is given the same noise
guesses a sampled token as often as the two distributions couple (Gumbel coupling: at least (1 - d) / (1 + d), d their
total variation distance).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array
from . import engine as engines
from .history import limits
from .sampling import Rule, Values, numbers


def prompt_lookup(row: Sequence[int], most: int, longest: int) -> list[int]:
    """What followed the last time that the text ended as it ends now, by its last `longest` tokens or fewer."""
    text = np.array(row)
    for n in range(min(longest, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
        found = np.flatnonzero((windows == text[-n:]).all(axis=1))
        if len(found):
            return text[found[-1] + n :][:most].tolist()
    return []


def _guessing(rule: Rule) -> Rule:
    """The rule of a guess: a token only, and by the filters that a backend's step has."""
    return Rule(rule.sample, tuple(name for name in rule.filters if not name.endswith("_cutoff")))


class Assistant:
    """A smaller model that writes ahead, and forgets what was not taken; its cache follows the rows."""

    def __init__(self, engine: engines.Engine, prompt: engines.Prompt, key: Array) -> None:
        self.engine, self.generation, self.key = engine, prompt.generation, key
        self.rule = _guessing(Rule.of(prompt.generation))
        copies = prompt.generation.num_return_sequences
        rows = [row for row in prompt.rows for _ in range(copies)]
        self.held: list[list[int]] = [[] for _ in rows]
        self.cache, rest = engines.begin(engine, prompt, None)
        if copies > 1:
            self.cache, _ = engines.repeat_rows(engine, self.cache, rest, self.generation, copies)
            self.held = [row[:-1] for row in rows]
        self.prompts = [len(row) for row in rows]

    def propose(self, rows: list[list[int]], most: list[int]) -> list[list[int]]:
        """So many guesses for each row, fewer where its logits hold nothing to choose from."""
        common = [min(engines.common_length(row, old), len(row) - 1) for row, old in zip(rows, self.held, strict=True)]
        back = np.array([len(old) for old in self.held]) - common
        if back.any():
            self.cache = self.cache.rollback(back, self.engine.config)
        self.held = [old[:shared] for old, shared in zip(self.held, common, strict=True)]
        drafts: list[list[int]] = [[] for _ in rows]
        for place in range(max(most)):
            wants = [len(draft) == place < n for draft, n in zip(drafts, most, strict=True)]
            if not any(wants):
                break
            texts = [[*row, *draft] for row, draft in zip(rows, drafts, strict=True)]
            fed = [text[len(old) :] if w else [] for text, old, w in zip(texts, self.held, wants, strict=True)]
            for row, token in enumerate(self._tokens(texts, fed, wants)):
                self.held[row] += fed[row]
                if wants[row] and token >= 0:
                    drafts[row].append(token)
        return drafts

    def _tokens(self, texts: list[list[int]], fed: list[list[int]], wants: list[bool]) -> list[int]:
        made = [len(text) - prompt for text, prompt in zip(texts, self.prompts, strict=True)]
        without: list[list[int]] = [[] for _ in texts]
        size, over = self.engine.config.vocab_size, [not w for w in wants]
        bias, seen = limits(self.generation, size, texts, made, without, over, columns=1)
        values = Values(numbers(self.generation), self.key, np.array(made, np.int32), bias, seen)
        columns = max(map(len, fed))
        # one or two are the usual step: the last token, and the last guess where all were taken
        widths = [columns] if columns <= 2 else engines.piece_widths(self.engine, columns, self.generation)
        chosen, self.cache = engines.feed(self.engine, self.cache, fed, self.rule, values, widths)
        return [int(token) for token in chosen.token[:, 0]]
