"""The texts that a model is calibrated or measured on: token ids out of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..disk import limits, lines, reading
from ..errors import EmptyInputError, InputError, TemplateError
from ..plain import is_int
from ..telling import shown
from ..text.tokenizer import MistralTokenizer

CHARACTERS_PER_TOKEN = 8
"""So many characters surely hold a token, on average: of longer files no more is encoded."""


def texts(path: reading.PathLike, tokenizer: MistralTokenizer, *, length: int, most: int) -> Array:
    """Token ids [N, length] of a text, N at most `most`: pieces from all over it, begun as the tokenizer begins a text.

    A .jsonl has an object a line: {"messages": [...]}, a conversation for the tokenizer, or {"text": "..."}. Any
    other file is text in UTF-8. Raises EmptyInputError where there is not one piece, InputError for a malformed
    file, TemplateError for a conversation that the tokenizer does not write, and what reading raises.
    """
    for name, value in (("length", length), ("most", most)):
        if not is_int(value) or value < 1:
            raise InputError(f"{name} must be a positive integer, got {shown(value)}.")
    path = reading.as_path(path)
    characters = CHARACTERS_PER_TOKEN * length
    if path.suffix == ".jsonl":
        with lines.JsonLines(path, error=InputError) as rows:
            many = sum(map(rows.size, range(len(rows)))) // (characters * most) or 1
            runs = [[each for at in range(0, len(rows), many) for each in _row(rows[at], tokenizer, rows.where(at))]]
    else:
        runs = [tokenizer.encode(part, add_special_tokens=False) for part in _parts(_text(path), characters, most)]
    pieces = [piece for run in runs for piece in _pieces(run, tokenizer.frame.before, length)]
    if not pieces:
        raise EmptyInputError(
            f"{path} must have {length} tokens at least, for one piece of the length, got {sum(map(len, runs))}; take "
            "more text, or a smaller length."
        )
    return np.array(_spread(pieces, most), np.int64)


def _text(path: Path) -> str:
    data = reading.read(path, limit=limits.TEXT_BYTES, what=" of text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} must be UTF-8, got another byte at {cause.start}; save it as UTF-8.") from cause


def _parts(text: str, characters: int, most: int) -> list[str]:
    """All of a text, or of a long one as many parts as pieces are wanted, from the next line on if one is near."""
    if len(text) <= characters * most:
        return [text] if text.strip() else []
    places = [len(text) * part // most for part in range(most)]
    ends = [text.find("\n", place, place + characters // 4) for place in places]
    starts = [place if end < 0 else end + 1 for place, end in zip(places, ends, strict=True)]
    return [text[start : start + characters] for start in starts]


def _row(row: Mapping[str, Any], tokenizer: MistralTokenizer, where: str) -> list[int]:
    """The ids of one line of a .jsonl."""
    if isinstance(row.get("messages"), list):
        try:
            return list(tokenizer.apply_chat_template(row["messages"]))
        except TemplateError as cause:
            raise TemplateError(f"{where}: {cause}") from cause
    if isinstance(row.get("text"), str):
        return list(tokenizer.encode(row["text"]))
    raise InputError(f'{where} must have "messages", a list, or "text", a string; got the keys {shown(sorted(row))}.')


def _pieces(run: list[int], before: list[int], length: int) -> list[list[int]]:
    """Tokens that follow each other, cut; each piece begins with what stands before a text."""
    pieces: list[list[int]] = []
    start = 0
    while True:
        begun = [] if run[start : start + len(before)] == before else before[: length - 1]
        stop = start + length - len(begun)
        if stop > len(run):
            return pieces
        pieces.append(begun + run[start:stop])
        start = stop


def _spread(pieces: list[list[int]], most: int) -> list[list[int]]:
    """So many of them at most, in even steps."""
    count = min(most, len(pieces))
    return [pieces[index * len(pieces) // count] for index in range(count)]
