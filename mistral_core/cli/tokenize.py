"""`mistral tokenize PATH "text"`: the tokens of a text, ids and pieces."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ..errors import EmptyInputError
from ..pictures.labels import labels
from ..text.mistral_common import MistralCommonTokenizer
from ..text.tokenizer import MistralTokenizer
from . import progress, put, put_painted, stdin

COLOURS = (18, 22, 52, 54, 94, 23)
"""Backgrounds of neighbouring tokens, of the terminal's 256 colours: dark, so that white is read on each."""


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="a checkpoint directory, a tokenizer file or a hub id")
    command.add_argument("text", nargs="?", default="-", help="the text; - or nothing reads stdin")
    command.add_argument("--decode", action="store_true", help="the text is ids: show what they say")
    command.add_argument("--parse-special", action="store_true", help="read control tokens such as [INST] in the text")
    command.add_argument("--no-special-tokens", action="store_true", help="leave out what stands before a text")
    command.add_argument("--mistral-common", action="store_true", help="by the library mistral-common")


def run(options: argparse.Namespace) -> int:
    """Print tokens, one a line; coloured in a terminal."""
    text = stdin.read("text", "tokenize") if options.text == "-" else options.text
    kind: Any = MistralCommonTokenizer if options.mistral_common else MistralTokenizer
    tokenizer = kind.from_pretrained(options.path)
    if options.decode:
        ids = _ids(text)
    else:
        framed = not options.no_special_tokens
        ids = tokenizer.encode(text, add_special_tokens=framed, parse_special=options.parse_special)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    if options.json:
        put(json.dumps({"ids": ids, "tokens": tokens, "text": decoded}, ensure_ascii=False))
        return 0
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    pieces = labels(tokenizer, ids)
    if coloured:
        pieces = [_painted(piece, place) for place, piece in enumerate(pieces)]
        put_painted("".join(pieces) + "\n")
    width = len(str(max(ids, default=0)))
    for each, piece in zip(ids, pieces, strict=True):
        (put_painted if coloured else put)(f"{each:{width}}  {piece}")
    characters = len(decoded)
    progress(f"{len(ids)} tokens, {characters} characters")
    if options.decode:
        put(decoded)
    return 0


def _ids(text: str) -> list[int]:
    """Ids written one after another, with anything between them."""
    words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError as cause:
        raise EmptyInputError(f"text must be ids with --decode, such as 1 733 16289, got {text[:40]!r}.") from cause


def _painted(text: str, place: int) -> str:
    return f"\x1b[97;48;5;{COLOURS[place % len(COLOURS)]}m{text}\x1b[0m"
