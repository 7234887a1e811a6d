"""What a tokenizer.json asks the library `tokenizers` to do, bounded before it does any of it.

A few kB may ask for gigabytes: a normalizer that doubles a text, thirty times; a post-processor that puts a million
tokens around it. What each step may make of one byte is known from its description; multiplied, it has a limit.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..disk import limits
from ..errors import TokenizerError
from ..telling import shown
from . import patterns

Part = Mapping[str, Any]
"""A step as tokenizer.json has it."""

_LISTS = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
    "post_processor": "processors",
}  # fmt: skip
"""Part of a tokenizer.json -> where a Sequence of that kind has its steps."""

_FACTORS = {
    "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 10, "ByteLevel": 4, "Metaspace": 5,
    "CTC": 4, "BPEDecoder": 4, "WordPiece": 4,
}  # fmt: skip
"""Step -> the bytes that it may make of one: Unicode's own bounds of UTF-8, and a space or sign before each piece."""


def read(data: bytes, where: str) -> dict[str, Any]:
    """The object in a tokenizer.json; raises TokenizerError where it is none."""
    try:
        whole = json.loads(data.decode())
    except UnicodeDecodeError as cause:
        raise TokenizerError(f"{where}: not UTF-8 text ({cause}); fetch it again.") from cause
    except (ValueError, RecursionError) as cause:
        raise TokenizerError(f"{where}: not a tokenizer.json ({cause}); fetch it again.") from cause
    if not isinstance(whole, dict) or not isinstance(whole.get("model"), dict):
        raise TokenizerError(f"{where}: not a tokenizer.json (no model in it); fetch it again.")
    return whole


def size(whole: Part) -> int:
    """One more than the highest id of a checked tokenizer.json, whose ids may have gaps."""
    vocabulary = whole["model"].get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max(max(ids, default=-1), max((each["id"] for each in whole["added_tokens"]), default=-1))


def check(whole: dict[str, Any], where: str) -> int:
    """The bytes that a tokenizer may make of each byte of a text before it is cut into tokens.

    Raises TokenizerError for what is malformed, or may never end, LimitExceededError for what is out of proportion.
    """
    _check_ids(whole, where)
    _check_model(whole["model"], where)
    longest = _longest_token(whole, where)
    _check_frame(whole, where)
    written = longest * _factor(whole, "decoder", where)
    limits.check(written, limits.DECODED_TOKEN, what="bytes that the decoder may make of a token", where=where)
    factor = _factor(whole, "normalizer", where) * _factor(whole, "pre_tokenizer", where)
    limits.check(factor, limits.EXPANSION, what="bytes made of one before a text is cut into tokens", where=where)
    return factor


def _check_ids(whole: dict[str, Any], where: str) -> None:
    """Ids are small integers: the library counts up to the highest one."""
    vocabulary, added = whole["model"].get("vocab"), whole.setdefault("added_tokens", [])
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise TokenizerError(f"{where}: no vocabulary, or added_tokens that are no list; fetch it again.")
    for each in added:
        if not isinstance(each, dict) or not isinstance(each.get("content"), str):
            raise TokenizerError(f"{where}: the added token must be an object, got {shown(each)}: fetch it again.")
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ()), *(each.get("id") for each in added)]
    wrong = next((each for each in ids if isinstance(each, bool) or not isinstance(each, int) or each < 0), None)
    if wrong is not None or None in ids:
        raise TokenizerError(f"{where}: the id must be an integer of at least 0, got {str(wrong)[:40]!a}.")
    limits.check(max(ids, default=0), limits.VOCABULARY, what="as an id", where=where)


def _check_model(model: Part, where: str) -> None:
    """What would panic, hang or raise only when a text is encoded."""
    vocabulary = model.get("vocab")
    unknown, kind = model.get("unk_token"), model.get("type")
    if not isinstance(unknown, str | None):
        raise TokenizerError(f"{where}: unk_token must be a string, got {str(unknown)[:80]!a}: fetch it again.")
    names = _names(vocabulary)
    if kind == "WordPiece":
        limit = model.get("max_input_chars_per_word")
        if isinstance(limit, int):
            limits.check(limit, limits.WORD_CHARACTERS, what="characters in a word of a WordPiece", where=where)
    needs = kind in ("WordLevel", "WordPiece") or unknown is not None
    if names is not None and kind != "Unigram" and needs and unknown not in names:
        raise TokenizerError(f"{where}: unk_token {str(unknown)[:80]!a} is no token of it; fetch it again.")
    if model.get("dropout"):
        raise TokenizerError(
            f"{where}: dropout {str(model['dropout'])[:40]!a}, by which a text has other ids each time; remove it."
        )
    prefix = model.get("continuing_subword_prefix")
    if kind == "BPE" and prefix and isinstance(prefix, str):
        _check_merges(model.get("merges"), prefix, where)


def _names(vocabulary: Any) -> Any:
    """The tokens of a vocabulary, of a dict or of Unigram's pairs; None for anything else."""
    if isinstance(vocabulary, Mapping):
        return vocabulary.keys()
    if isinstance(vocabulary, list) and all(isinstance(each, list) and each for each in vocabulary):
        return [each[0] for each in vocabulary]
    return None


def _check_merges(merges: Any, prefix: str, where: str) -> None:
    """The second half of each merge must begin with the prefix, which the library cuts off unseen."""
    for merge in merges if isinstance(merges, list) else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and str(pair[1]).startswith(prefix)):
            raise TokenizerError(
                f"{where}: the merge {shown(merge)}, whose end does not begin with {prefix[:80]!a}; fetch it again."
            )


def _longest_token(whole: Part, where: str) -> int:
    """Characters of the longest token; raises LimitExceededError for one that is too long, or too many added ones."""
    names, added = _names(whole["model"].get("vocab")) or (), whole["added_tokens"]
    limits.check(len(added), limits.SPECIAL_TOKENS, what="added tokens", where=where)
    texts = (name for name in (*names, *(each["content"] for each in added)) if isinstance(name, str))
    longest = max(map(len, texts), default=0)
    limits.check(longest, limits.TOKEN_CHARACTERS, what="characters of one token", where=where)
    return longest


def _check_frame(whole: Part, where: str) -> None:
    """How much a post-processor puts around a text, which it may write once."""
    tokens = 0
    for step in _steps(whole.get("post_processor"), "post_processor", where):
        for pieces in (step.get("single"), step.get("pair")):
            listed = [each for each in pieces if isinstance(each, dict)] if isinstance(pieces, list) else []
            named = [each["Sequence"].get("id") for each in listed if isinstance(each.get("Sequence"), dict)]
            if len(set(map(str, named))) < len(named):
                raise TokenizerError(f"{where}: post_processor: writes a text more than once; fetch it again.")
            tokens += sum(_many(step, each.get("SpecialToken")) for each in listed)
    limits.check(tokens, limits.TOKENS_AROUND, what="special tokens around a text", where=where)


def _many(step: Part, piece: Any) -> int:
    """How many ids a special token of a template stands for."""
    if not isinstance(piece, dict):
        return 0
    tokens, name = step.get("special_tokens"), piece.get("id")
    token = tokens.get(name) if isinstance(tokens, dict) and isinstance(name, str) else None
    ids = token.get("ids") if isinstance(token, dict) else None
    return max(len(ids), 1) if isinstance(ids, list) else 1


def _factor(whole: Part, kind: str, where: str) -> int:
    factor, last = 1, None
    for step in _steps(whole.get(kind), kind, where):
        name = step.get("type")
        if name == last and name in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
            continue  # once more changes nothing
        factor *= _factor_of(step, name, f"{where}: {kind}")
        last = name
    return factor


def _factor_of(step: Part, name: Any, where: str) -> int:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(regex, str):
        patterns.check(regex, where)
    if name == "Replace":
        content = len(str(step.get("content", "")).encode(errors="replace"))
        fixed = pattern.get("String") if isinstance(pattern, dict) else None
        size = len(fixed.encode(errors="replace")) if isinstance(fixed, str) else 0
        return max(math.ceil(content / size), 1) if size else 1 + content  # a regular expression may match nothing
    if name == "Prepend":
        return 1 + len(str(step.get("prepend", "")).encode(errors="replace"))
    if name == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"), where)
    if name == "FixedLength" and not step.get("length"):
        raise TokenizerError(f"{where}: pieces of no length; fetch it again.")
    return _FACTORS.get(name, 1)


def _longest_replacement(charsmap: Any, where: str) -> int:
    """The most bytes that a charsmap of SentencePiece writes for a character: its size, a trie, and what is written."""
    try:
        data = base64.b64decode(charsmap, validate=True)
        size = int.from_bytes(data[:4], "little")
        if size % 4 or len(data) < 4 + size:
            raise ValueError(f"a trie of {size} bytes in {len(data)}")
        written = data[4 + size :]
        written.decode()
    except (TypeError, ValueError, binascii.Error) as cause:
        raise TokenizerError(f"{where}: precompiled_charsmap is none ({cause}); fetch it again.") from cause
    return max(map(len, written.split(b"\0")), default=1) or 1


def _steps(part: Any, kind: str, where: str) -> Iterator[Part]:
    """The steps of a part, those of sequences in sequences in their order; raises LimitExceededError for too many."""
    found = list(_flat(part, kind, where, 0))
    limits.check(len(found), limits.STEPS, what=f"steps of the {kind}", where=where)
    return iter(found)


def _flat(part: Any, kind: str, where: str, depth: int) -> Iterator[Part]:
    limits.check(depth, limits.STEPS, what=f"levels of the {kind}", where=where)
    if isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get(_LISTS[kind])
        for each in steps if isinstance(steps, list) else ():
            yield from _flat(each, kind, where, depth + 1)
    elif isinstance(part, dict):
        if not isinstance(part.get("type"), str):
            raise TokenizerError(f"{where}: {kind}: a step of type {str(part.get('type'))[:40]!a}; fetch it again.")
        yield part
