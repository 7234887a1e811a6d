"""The images of docs/pictures.md, each made by the command that stands above it.

`python tests/pictures_page.py --write` makes them anew. They are written in the font that comes with Pillow, so that
every machine makes the same.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from unittest import mock

from mistral_core.cli import main
from mistral_core.data import TINY_CHECKPOINT

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pictures.md"


def commands() -> dict[str, list[str]]:
    """Image, below the project -> the words of the command that makes it."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("    mistral ") and " --png " in line:
            words = shlex.split(line)[1:]
            found[words[-1]] = words
    return found


def make(name: str, path: Path) -> None:
    """Run the command of an image, of the embedded checkpoint, into a file."""
    words = [str(TINY_CHECKPOINT) if word == "PATH" else word for word in commands()[name]]
    with mock.patch("mistral_core.pictures.fonts.FILES", ()):
        assert main([*words[:-1], str(path)]) == 0


if __name__ == "__main__" and "--write" in sys.argv:
    for image in commands():
        make(image, ROOT / image)
