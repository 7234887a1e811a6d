"""Tokens as labels: what they stand for, with nothing in them that could move a cursor or turn a line around."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ..text.bpe import byte_characters
from ..text.tokenizer import MistralTokenizer

SPACE = "▁"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CIRCLE = "\N{DOTTED CIRCLE}"
ESCAPED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Unicode categories that show nothing, or change how what is near them shows."""
LONGEST = 64
"""Characters of a label; a token of a thousand spaces is told by its beginning."""


def labels(tokenizer: MistralTokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to a text, safe to show; spaces are ▁, bytes that are no character <0xF0> or \\xf0."""
    # after another token, so that the space in front of the first word of a text is not lost
    before = tokenizer.encode("a", add_special_tokens=False)
    length = len(tokenizer.decode(before, skip_special_tokens=False))
    found = []
    for token in ids:
        text = tokenizer.decode([*before, token], skip_special_tokens=False)[length:]
        if not text or REPLACEMENT in text:
            text = _bytes(tokenizer.convert_ids_to_tokens([token])[0])
        found.append(safe(text))
    return found


def safe(text: str) -> str:
    """Spaces as ▁, what is invisible or turns text around as an escape, a mark without its letter on a circle."""
    shown = "".join(SPACE if c == " " else _escaped(c) for c in text[:LONGEST])
    if shown and unicodedata.category(shown[0]).startswith("M"):
        shown = CIRCLE + shown
    return shown + "…" * (len(text) > LONGEST)


def _bytes(token: str) -> str:
    """What a token of a byte-level vocabulary, where ð stands for the byte F0, is made of; others as they are."""
    values = {character: byte for byte, character in enumerate(byte_characters())}
    if not values.keys() >= set(token):
        return token
    return bytes(values[character] for character in token).decode(errors="backslashreplace")


def ascii_only(label: str) -> str:
    """For outputs that have no other characters."""
    return label.replace(SPACE, "_").replace("…", "...").encode("ascii", "backslashreplace").decode()


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ESCAPED:
        return character
    return character.encode("unicode_escape").decode("ascii") if ord(character) > 0xFF else repr(character)[1:-1]
