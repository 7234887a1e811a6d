"""A faster encoder for much text: kitoken, where it gives the ids of `tokenizers`; two to four times as fast.

kitoken merges any two tokens that together are a token, the best one first, and takes a whole word that is a token.
That is what a BPE does whose merges are all there are, by a rank of the token that they make, and whose tokens are all
made by merges: those of SentencePiece and Tekken. For others there is no encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from .. import extras
from ..threads import Threads, processors
from . import tekken
from .bpe import byte_characters, merges_by_score
from .decoder import BYTE_TOKENS
from .sentencepiece import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHARACTERS_PER_THREAD = 1 << 16
"""Characters that are worth a thread of their own."""

Encode = Callable[[Sequence[str]], list[list[int]]]

_PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
_WORDS = [{"Pattern": {"pattern": {"Regex": f"{SPACE}+"}, "behavior": "MergeRight"}}]


def encoder(tokenizer: Tokenizer, apart: Collection[str]) -> Encode | None:
    """What encodes texts as a tokenizer does; None where kitoken would give other ids. Raises MissingExtraError.

    The tokenizer is Tekken's, or SentencePiece's BPE and nothing else: spaces are written as U+2581 in its texts.
    The tokens `apart` are never found in them: the encoder does not know them.
    """
    library = extras.require("kitoken", "fast", what="a tokenizer with fast=True")
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    kind = _kind(description)
    if kind is None:
        return None
    vocabulary = {text: number for text, number in model["vocab"].items() if text not in {*apart, model["unk_token"]}}
    if not _has_all_merges(model, vocabulary) or not _makes_all(tokenizer, vocabulary, kind):
        return None
    model.update(vocab=vocabulary, unk_token=None)  # bytes stand for what is unknown
    description |= {"added_tokens": [], "post_processor": None}
    kitoken = library.Kitoken.from_tokenizers(json.dumps(description).encode())
    if kind == "SentencePiece":
        kitoken.set_config(kitoken.config() | {"split": _WORDS})

    def encode(texts: Sequence[str]) -> list[list[int]]:
        lengths = list(accumulate(map(len, texts), initial=0))
        count = min(processors(), lengths[-1] // CHARACTERS_PER_THREAD + 1)
        if count == 1:
            return kitoken.encode_all(list(texts))
        places = [_place(lengths, number / count) for number in range(count + 1)]
        with Threads(count) as threads:  # it encodes without Python's lock
            return list(chain(*threads.map(kitoken.encode_all, [list(texts[a:b]) for a, b in pairwise(places)])))

    return encode


def _place(lengths: list[int], share: float) -> int:
    """How many texts make a share of all characters."""
    return next(place for place, length in enumerate(lengths) if length >= share * lengths[-1])


def _kind(description: dict[str, Any]) -> str | None:
    """`SentencePiece` or `Tekken`, by all but the vocabulary and the merges; None for anything else."""
    model, before = description["model"], description["pre_tokenizer"]
    if model["type"] != "BPE" or any(model.get(name) not in (value, "") for name, value in _PLAIN.items()):
        return None
    if description["normalizer"] is not None:
        return None
    if before is None:
        return "SentencePiece" if model["byte_fallback"] and model["vocab"].keys() >= set(BYTE_TOKENS) else None
    steps = before.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, as_bytes = steps
    words = split["behavior"] == "Isolated" and not split["invert"] and split["pattern"] == {"Regex": tekken.PATTERN}
    plain = not as_bytes["add_prefix_space"] and not as_bytes["use_regex"] and not model["byte_fallback"]
    return "Tekken" if words and plain and model["vocab"].keys() >= set(byte_characters()) else None


def _has_all_merges(model: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether a BPE has every merge there can be, ranked by the token that it makes."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    last = len(model["merges"])
    scores = {text: -float(ranks.get(text, last)) for text in sorted(vocabulary, key=vocabulary.__getitem__)}
    return merges_by_score(scores) == [tuple(merge) for merge in model["merges"]]


def _makes_all(tokenizer: Tokenizer, vocabulary: dict[str, int], kind: str) -> bool:
    """Whether every token is what its own text becomes, and none of SentencePiece's goes on into a next word."""
    from tokenizers import Tokenizer

    texts = list(vocabulary)
    if kind == "SentencePiece":
        texts = list(vocabulary.keys() - BYTE_TOKENS)
        if any(SPACE in text.lstrip(SPACE) for text in texts):
            return False
    found = Tokenizer(tokenizer.model).encode_batch_fast(texts, add_special_tokens=False)
    return all(each.ids == [vocabulary[text]] for text, each in zip(texts, found, strict=True))
