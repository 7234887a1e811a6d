"""tekken.json: the byte-level BPE of Mistral's newer models."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NamedTuple

from ..disk import limits
from ..errors import TokenizerError
from . import patterns, utf8
from .chat.versions import VERSIONS

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What cuts a text into words in every Tekken that was published."""

LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What some published tokenizer.json of Tekken have in its place by mistake (huggingface/transformers#42299)."""

MAX_TOKENS = limits.TEKKEN_WORDS

_OLD_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""What a file does not say up to version 7."""


class Tekken(NamedTuple):
    """What a file says."""

    version: str
    """Of the instruct format; a key of VERSIONS."""
    pattern: str
    special: list[str]
    """Special tokens, which have the first ids."""
    words: list[bytes]
    """The other tokens: word i has the id len(special) + i and is merged by the rank i."""
    settings: dict[str, Any] | None
    """What settings of a model a conversation may give, from version 15."""


def parse(data: bytes, where: str = "tekken.json") -> Tekken:
    """The vocabulary of a file's bytes; raises TokenizerError where it is not one, LimitExceededError beyond limits."""
    try:
        whole = json.loads(data)
        config = whole["config"]
        count, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        if not 0 < count <= size <= count + len(whole["vocab"]) <= MAX_TOKENS:
            raise ValueError(f"{size} tokens, {count} of them special, {len(whole['vocab'])} words")
        words = [base64.b64decode(token["token_bytes"], validate=True) for token in whole["vocab"][: size - count]]
        tekken = Tekken(
            version=str(config.get("version", "v3")),
            pattern=_string(config["pattern"]),
            special=_specials(whole.get("special_tokens"), count),
            words=words,
            settings=whole.get("model_settings_builder"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, binascii.Error) as cause:
        raise TokenizerError(f"{where}: not a tekken.json ({cause!r}); fetch it again.") from cause
    longest = max(map(len, (*words, *tekken.special)), default=0)
    limits.check(longest, limits.TOKEN_CHARACTERS, what="bytes or characters of one token", where=where)
    limits.check(count, limits.SPECIAL_TOKENS, what="special tokens", where=where)
    patterns.check(tekken.pattern, where)
    if tekken.version not in VERSIONS:
        known = ", ".join(VERSIONS)
        raise TokenizerError(
            f"{where}: version must be one of {known}, got {tekken.version[:40]!a}; update this package."
        )
    if len(set(words)) != len(words) or b"" in words:
        raise TokenizerError(f"{where}: its tokens are not all different; fetch it again.")
    return tekken


def _specials(listed: list[dict[str, Any]] | None, count: int) -> list[str]:
    """The text of each special token, those that have no name included."""
    names = dict(enumerate(_OLD_SPECIALS[:count])) if listed is None else {}
    for token in listed or ():
        names[int(token["rank"])] = _string(token["token_str"])
    found = [names.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    if len(set(found)) != count or max(names, default=0) >= count:
        raise ValueError(f"{len(names)} special tokens for {count} places, not all different")
    return found


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:80]!a} instead of a string")
    if problem := utf8.problem(value):
        raise ValueError(problem)
    return value
