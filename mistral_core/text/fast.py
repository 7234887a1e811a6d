"""Much text by kitoken, where it gives the ids of `tokenizers`: two to four times as fast, with the extra `fast`.

kitoken merges any two tokens that together are a token, the best one first, and takes a whole word that is a token.
That is what a BPE does whose merges are all there are, by a rank of the token that they make, and whose tokens are all
made by merges: SentencePiece's. For others, and for those that go on from word to word, `encoder` gives nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

from .bpe import merges_by_score
from .decoder import BYTE_TOKENS
from .sentencepiece import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MUCH = 1 << 22
"""Characters after which an encoder is made: making it takes as long as they took."""

ALONE = 1 << 16
"""Characters that are worth a thread of their own."""

Encode = Callable[[Sequence[str]], list[list[int]]]

_PLAIN = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
_WORDS = [{"Pattern": {"pattern": {"Regex": f"{SPACE}+"}, "behavior": "MergeRight"}}]


def encoder(tokenizer: Tokenizer, apart: Collection[str]) -> Encode | None:
    """What encodes texts as a tokenizer does that has a BPE and nothing else; None where kitoken is not to be had.

    Spaces are written as U+2581 in the texts. The tokens `apart` are never found in them: it does not know them.
    """
    try:
        from kitoken import Kitoken
    except ImportError:
        return None
    description = json.loads(tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        return None
    vocabulary = {text: number for text, number in model["vocab"].items() if text not in {*apart, model["unk_token"]}}
    if not _is_sentencepiece(model, vocabulary) or not _makes_all(tokenizer, vocabulary):
        return None
    model.update(vocab=vocabulary, unk_token=None)  # bytes stand for what is unknown
    kitoken = Kitoken.from_tokenizers(json.dumps(description).encode())
    kitoken.set_config(kitoken.config() | {"split": _WORDS})

    def encode(texts: Sequence[str]) -> list[list[int]]:
        lengths = list(accumulate(map(len, texts), initial=0))
        threads = min(os.cpu_count() or 1, lengths[-1] // ALONE + 1)
        if threads == 1:
            return kitoken.encode_all(list(texts))
        places = [_place(lengths, number / threads) for number in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:  # it encodes without Python's lock
            return list(chain(*pool.map(kitoken.encode_all, [list(texts[a:b]) for a, b in pairwise(places)])))

    return encode


def _place(lengths: list[int], share: float) -> int:
    """How many texts make a share of all characters."""
    return next(place for place, length in enumerate(lengths) if length >= share * lengths[-1])


def _is_sentencepiece(model: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether a BPE has every merge there can be, ranked by the token it makes, and tokens of all bytes."""
    if any(model.get(name) not in (value, "") for name, value in _PLAIN.items()):
        return False
    if not model["byte_fallback"] or not vocabulary.keys() >= set(BYTE_TOKENS):
        return False
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        ranks.setdefault(left + right, rank)
    last = len(model["merges"])
    scores = {text: -float(ranks.get(text, last)) for text in sorted(vocabulary, key=vocabulary.__getitem__)}
    return merges_by_score(scores) == [tuple(merge) for merge in model["merges"]]


def _makes_all(tokenizer: Tokenizer, vocabulary: dict[str, int]) -> bool:
    """Whether every token but the bytes' is what its own text becomes, and none goes on into a next word."""
    texts = list(vocabulary.keys() - BYTE_TOKENS)
    if any(SPACE in text.lstrip(SPACE) for text in texts):
        return False
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return all(each.ids == [vocabulary[text]] for text, each in zip(texts, found, strict=True))
