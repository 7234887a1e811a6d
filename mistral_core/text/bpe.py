"""Tokenizer files of Mistral as models of the library `tokenizers`, with the ids of the libraries they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import UnsupportedFeatureError
from .guarded import typed
from .sentencepiece import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Model
from .tekken import Tekken

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def of_sentencepiece(model: Model, where: str) -> Tokenizer:
    """A BPE with byte fallback that encodes as the library sentencepiece does.

    Control pieces are special tokens; user-defined pieces stand in a text, as there. Raises UnsupportedFeatureError
    for a model of another kind than Mistral's.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not (model.is_bpe and model.byte_fallback and model.add_dummy_prefix and model.keeps_text):
        raise UnsupportedFeatureError(
            f"{where}: not a BPE with byte fallback that takes a text as it is, as Mistral's are ({model[1:]}); "
            "put a tokenizer.json beside it."
        )
    kinds = [kind for _, _, kind in model.pieces]
    unknown = model.pieces[kinds.index(UNKNOWN)][0] if UNKNOWN in kinds else None
    merges = merges_by_score({text: score for text, score, kind in model.pieces if kind == NORMAL})
    own = sorted((text for text, _, kind in model.pieces if kind == USER_DEFINED), key=len, reverse=True)
    numbers = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    with typed(where, "no vocabulary of a BPE"):
        tokenizer = Tokenizer(
            models.BPE(
                numbers,
                merges,
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=True,
                ignore_merges=bool(own),  # user-defined pieces are not made of others
            )
        )
        if own:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_special(tokenizer, [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)])
    return tokenizer


def of_tekken(tekken: Tekken, where: str) -> Tokenizer:
    """A byte-level BPE that encodes as the library tiktoken does; raises TokenizerError for a malformed pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = byte_characters()
    words = ["".join(map(letters.__getitem__, word)) for word in tekken.words]
    numbers = {text: number for number, text in enumerate([*tekken.special, *words])}
    ranks = {text: -float(rank) for rank, text in enumerate(words)}
    with typed(where, "no vocabulary of a BPE"):
        tokenizer = Tokenizer(models.BPE(numbers, merges_by_score(ranks)))
    with typed(where, "its pattern is no regular expression"):
        words_of = pre_tokenizers.Split(Regex(tekken.pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words_of, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tekken.special)
    return tokenizer


def _add_special(tokenizer: Tokenizer, names: list[str]) -> None:
    """Mark special tokens, and let a text begin with `<s>`."""
    from tokenizers import AddedToken, processors

    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if "<s>" in names:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token, the best score first: what merging by scores alone would merge.

    Equal scores keep the order of the tokens, and the pairs of one token that of their halves, as in the files that
    were published.
    """
    number = {text: place for place, text in enumerate(scores)}.get
    merges: list[tuple[str, str]] = []
    for text in sorted(scores, key=scores.__getitem__, reverse=True):
        pairs = []
        for at in range(1, len(text)):  # a plain loop: this is most of what reading a tokenizer.model takes
            left = number(text[:at])
            if left is not None and (right := number(text[at:])) is not None:
                pairs.append((left, right, at))
        merges += [(text[:at], text[at:]) for _, _, at in sorted(pairs)]
    return merges


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE (GPT-2's alphabet)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return [
        chr(code) for _, code in sorted([*zip(plain, plain, strict=True), *zip(others, range(256, 324), strict=True)])
    ]
