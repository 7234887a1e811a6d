"""`mistral mask PATH "text"`: which tokens see which, and why the others are not seen."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import InputError
from ..pictures import AttentionMaskVisualizer
from ..pictures.inputs import is_chat
from ..pictures.picture import Picture
from . import backend_argument, progress, put, stdin


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    looked_at(command)
    backend_argument(command, "torch, flax or tf: its own mask; default: the float64 reference's")
    command.add_argument("--layer", type=number_or_word, default="all", help="a number; default: one for each window")


def looked_at(command: argparse.ArgumentParser) -> None:
    """What is looked at and where the picture goes: arguments that `mistral attention` has too."""
    command.add_argument("path", help="a checkpoint directory or a hub id")
    command.add_argument("text", nargs="*", help="the text, or several: a batch; - or nothing at all reads stdin")
    command.add_argument(
        "--chat", action="append", default=[], help="messages in JSON, or one question; may be repeated"
    )
    command.add_argument("--packed", action="store_true", help="several texts in one row, told apart by document_ids")
    command.add_argument("--padding-side", choices=("left", "right"), default="left", help="default: left")
    command.add_argument("--window", help="another window than the checkpoint's: a number, or none")
    command.add_argument("--html", metavar="FILE", help="write a page that explains each cell")
    command.add_argument("--png", metavar="FILE", help="write an image")
    command.add_argument("--font", metavar="FILE", help="a font for the image, where those found here lack characters")


def run(options: argparse.Namespace) -> int:
    """Print the mask, or write it to files."""
    visualizer = AttentionMaskVisualizer(options.path, backend=options.backend, **overrides(options))
    picture = visualizer.picture(
        source(options), layer=options.layer, padding_side=options.padding_side, packed=options.packed
    )
    return put_out(picture, options)


def source(options: argparse.Namespace) -> Any:
    """A text, a list of texts, or chats, from the arguments or from stdin. Raises EmptyInputError, InputError."""
    texts = options.text
    if texts == ["-"] or (not texts and not options.chat):
        texts = [stdin.read("text", "look at")]
    found = [*texts, *map(_chat, options.chat)]
    return found[0] if len(found) == 1 else found


def number_or_word(text: str) -> int | str:
    """The number that a text is, or the text."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the config that options replace. Raises InputError."""
    if options.window is None:
        return {}
    if options.window.lower() == "none":
        return {"sliding_window": None, "layer_types": None}
    if not options.window.isdecimal():
        raise InputError(f"--window must be a number of tokens, or none, got {options.window!r}.")
    return {"sliding_window": int(options.window)}


def put_out(picture: Picture, options: argparse.Namespace) -> int:
    """Write the files asked for; where none is, print the picture, or its numbers as JSON."""
    if options.html is not None:
        picture.html(options.html)
        progress(f"wrote {options.html}")
    if options.png is not None:
        picture.png(options.png, font=options.font)
        progress(f"wrote {options.png}")
    if options.json:
        put(json.dumps(picture.to_dict()))
    elif options.html is None and options.png is None:
        picture.print()
    return 0


def _chat(text: str) -> list[dict[str, Any]]:
    """Messages in JSON, or one question of the user."""
    try:
        messages = json.loads(text)
    except ValueError:
        messages = text
    if isinstance(messages, list) and is_chat(messages):
        return messages
    return [{"role": "user", "content": text}]
