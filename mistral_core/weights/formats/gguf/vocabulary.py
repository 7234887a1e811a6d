"""The two kinds of tokenizers that GGUF knows, and Tekken's file as one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ....text import tekken
from ....text.bpe import byte_characters, merges_by_score
from ....text.sentencepiece import CONTROL, NORMAL, UNKNOWN


class Vocabulary(NamedTuple):
    """A tokenizer of one of GGUF's two kinds."""

    tokens: dict[int, tuple[str, int]]
    """Id -> (text, kind)."""
    scores: Mapping[int, float] | None = None
    """Id -> score; makes it of the kind `llama`."""
    merges: Sequence[str] = ()
    words: str = ""
    """A name of `PATTERNS`, for `gpt2`."""
    space_prefix: bool = False


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether one of the names is that of a vocabulary."""
    return any(name in ("tokenizer.json", "tekken.json") or name.startswith("tokenizer.model") for name in names)


def of_tekken(file: tekken.Tekken) -> Vocabulary | None:
    """Special tokens first, then bytes and their merges by rank; None where words are cut by another pattern."""
    if file.pattern != tekken.PATTERN:
        return None
    tokens = {rank: (text, UNKNOWN if text == "<unk>" else CONTROL) for rank, text in enumerate(file.special)}
    letters = byte_characters()
    texts = ["".join(map(letters.__getitem__, word)) for word in file.words]
    tokens |= {len(file.special) + rank: (text, NORMAL) for rank, text in enumerate(texts)}
    pairs = merges_by_score({text: -float(rank) for rank, text in enumerate(texts)})
    return Vocabulary(tokens, None, [" ".join(pair) for pair in pairs], "tekken")
