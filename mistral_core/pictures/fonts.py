"""Text in an image: the fonts of this machine, and numbers for the characters that none of them has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import extras
from ..errors import InputError
from .labels import SPACE

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

FILES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "LiberationSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc", "PingFang.ttc", "Arial Unicode.ttf",
)  # fmt: skip
"""Looked for where the system keeps its fonts; Pillow's own, which is always there, has little more than ASCII."""
TALL_PIXELS = 40
"""Pixels at which glyphs are compared."""


class Fonts:
    """The fonts that are here, `font` (a file) before them. Raises InputError for a file that is no font."""

    def __init__(self, font: str | None = None) -> None:
        self._image, self._draw, self._types = (
            extras.require(f"PIL.{name}", "pictures", what="a PNG", package="Pillow")
            for name in ("Image", "ImageDraw", "ImageFont")
        )
        self._sized: dict[tuple[str | None, int], FreeTypeFont] = {}
        self._known: dict[tuple[str | None, str], bool] = {}
        self._files: list[str | None] = [name for name in FILES if self._opens(name)]
        self._files.append(None)
        if font is not None:
            if not self._opens(font):
                raise InputError(f"font must be a TrueType or OpenType file that can be read, got {font!r}.")
            self._files.insert(0, font)

    def written(self, text: str, size: int, colour: str, *, longest: float = float("inf"), bold: bool = False) -> Image:
        """The text alone, RGBA with nothing around it; what is longer than `longest` pixels ends in three dots."""
        font, text = self._fitting(text.replace(SPACE, "_"), size)  # whose ▁ reaches into the next line
        if font.getlength(text) > longest:
            while text and font.getlength(text + "...") > longest:
                text = text[:-1]
            text += "..."
        width = max(round(font.getlength(text)) + 2, 1)
        image = self._image.new("RGBA", (width, round(1.35 * size)))
        at = (1, round(size * 0.1))
        self._draw.Draw(image).text(at, text, fill=colour, font=font, stroke_width=int(bold), stroke_fill=colour)
        return image

    def _fitting(self, text: str, size: int) -> tuple[FreeTypeFont, str]:
        """The first font that has all characters, or the first one and numbers for what it lacks."""
        for file in self._files:
            if all(self._has(file, c) for c in text):
                return self._font(file, size), text
        first = self._files[0]
        return self._font(first, size), "".join(c if self._has(first, c) else _number(c) for c in text)

    def _has(self, file: str | None, character: str) -> bool:
        if (file, character) not in self._known:
            font = self._font(file, TALL_PIXELS)
            missing = bytes(font.getmask(character)) == bytes(font.getmask("\uffff"))  # no font has this one
            self._known[file, character] = character == " " or not missing
        return self._known[file, character]

    def _font(self, file: str | None, size: int) -> Any:
        if (file, size) not in self._sized:
            types: Any = self._types
            self._sized[file, size] = types.load_default(size) if file is None else types.truetype(file, size)
        return self._sized[file, size]

    def _opens(self, file: str) -> bool:
        try:
            self._font(file, TALL_PIXELS)
        except OSError:
            return False
        return True


def _number(character: str) -> str:
    return f"\\u{ord(character):04x}"
