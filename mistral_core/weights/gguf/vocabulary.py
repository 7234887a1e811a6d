"""The two kinds of tokenizers that GGUF knows, and Tekken's file as one of them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import TokenizerError
from ..formats.base import MAX_TEXT_BYTES
from .sentencepiece import CONTROL, NORMAL, UNKNOWN

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_OLD_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""What tekken.json before version 7 does not say."""


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


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE (GPT-2's alphabet)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return [
        chr(code) for _, code in sorted([*zip(plain, plain, strict=True), *zip(others, range(256, 324), strict=True)])
    ]


def of_tekken(data: dict[str, Any]) -> Vocabulary | None:
    """tekken.json: special tokens first, then bytes and their merges by rank."""
    try:
        config = data["config"]
        first, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        listed = data.get("special_tokens") or [
            {"rank": rank, "token_str": text} for rank, text in enumerate(_OLD_SPECIALS)
        ]
        special = {int(token["rank"]): str(token["token_str"]) for token in listed}
        words = [base64.b64decode(token["token_bytes"], validate=True) for token in data["vocab"][: size - first]]
    except (KeyError, TypeError, ValueError, binascii.Error) as cause:
        raise TokenizerError(f"tekken.json: malformed ({cause!r}); fetch it again.") from cause
    if config.get("pattern") != TEKKEN or not 0 <= first <= size <= MAX_TEXT_BYTES:
        return None
    tokens = {rank: (special.get(rank, f"<SPECIAL_{rank}>"), CONTROL) for rank in range(first)}
    if "<unk>" in special.values():
        tokens |= {rank: (text, UNKNOWN) for rank, text in special.items() if text == "<unk>"}
    letters = byte_characters()
    texts = ["".join(map(letters.__getitem__, word)) for word in words]
    tokens |= {first + rank: (text, NORMAL) for rank, text in enumerate(texts)}
    pairs = merges_by_rank({text: rank for rank, text in enumerate(texts)})
    return Vocabulary(tokens, None, [" ".join(pair) for pair in pairs], "tekken")


def merges_by_rank(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that is a token, the lowest rank first: what merging by ranks alone would merge."""
    found = []
    for text, rank in ranks.items():
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            if left in ranks and right in ranks:
                found.append((rank, at, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]
