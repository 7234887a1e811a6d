"""Ids to text, exactly, for any ids: what `tokenizers` decodes in the same way only where the ids came from a text."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from itertools import groupby

from .bpe import byte_characters
from .sentencepiece import SPACE

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
"""How SentencePiece writes a byte that belongs to no piece."""

EACH_BYTE = "mistral.each_byte"
"""Error handler of `bytes.decode`: one U+FFFD for every byte that is no character, as sentencepiece has it."""

codecs.register_error(EACH_BYTE, lambda error: ("\ufffd", error.start + 1))  # type: ignore[attr-defined]


class Decoder:
    """The text of ids: `special` ids have names, of which `unknown` is shown as such where names are not.

    The bytes of neighbouring ids are joined, so that a character may be spread over several. `errors` says what
    becomes of bytes that are no UTF-8; ids of `spaced` lose their first space at the beginning of a text.
    """

    def __init__(
        self,
        table: Sequence[bytes],
        special: Mapping[int, str],
        *,
        errors: str,
        spaced: frozenset[int] = frozenset(),
        unknown: Mapping[int, str] | None = None,
    ) -> None:
        self._table, self._special, self._errors = table, special, errors
        self._spaced, self._unknown = spaced, unknown or {}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids in [0, len(table))."""
        shown = self._unknown if skip_special_tokens else self._special
        parts = []
        for is_special, group in groupby(ids, self._special.__contains__):
            if is_special:
                parts += [shown.get(each, "") for each in group]
            else:
                parts.append(b"".join(map(self._table.__getitem__, group)).decode(errors=self._errors))
        text = "".join(parts)
        first = next((each for each in ids if each in shown or each not in self._special), None)
        return text[1:] if first in self._spaced else text


def of_pieces(
    tokens: Sequence[str], special: Mapping[int, str], *, unknown: Mapping[int, str], strips: bool
) -> Decoder:
    """The decoder of a BPE with byte fallback, by the text of each id's token; whether it `strips` the first space."""
    single = {token: bytes([byte]) for byte, token in enumerate(BYTE_TOKENS)}
    table = [single.get(token) or token.replace(SPACE, " ").encode() for token in tokens]
    spaced = frozenset(each for each, token in enumerate(tokens) if strips and token.startswith(SPACE))
    return Decoder(table, special, errors=EACH_BYTE, spaced=spaced, unknown=unknown)


def of_bytes(tokens: Sequence[str], special: Mapping[int, str], *, added: Mapping[int, str]) -> Decoder:
    """The decoder of a byte-level BPE, by the text of each id's token; `added` tokens are written as they are."""
    value = {letter: byte for byte, letter in enumerate(byte_characters())}
    table = [
        b"" if each in special else added[each].encode() if each in added else bytes(map(value.__getitem__, token))
        for each, token in enumerate(tokens)
    ]
    return Decoder(table, special, errors="replace")
