"""A picture as an image, in the page's light colours.

Drawn by Pillow, which matplotlib would need too, with eight packages more: here are cells of whole pixels, labels in
the first font that has their characters, and the same bytes for the same fonts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SequenceTooLongError
from .fonts import Fonts
from .palette import LIGHT, faded, weight_colour
from .panel import STYLES, Panel, Reason, Token

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

    from .picture import Picture

FEW_TOKENS = 512
MOST_PIXELS = 1 << 27
CELLS = ((32, 44), (96, 30), (256, 16), (FEW_TOKENS, 8))
"""Up to so many tokens, so many pixels a cell."""
GRID, GRID_PIXELS = 4, 288
"""From so many panels of weights on, they are shown small, without labels, about so wide."""
TEXT, TITLE, MARGIN, LONGEST_LABEL = 26, 34, 36, 300
NARROWEST_PIXELS = 1200
STEPS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


class Block(NamedTuple):
    """Something of a size that paints itself at a place."""

    width: int
    height: int
    paint: Callable[[Image, int, int], None]


def draw(picture: Picture, *, font: str | None = None) -> Image:
    """The image, RGB. Raises SequenceTooLongError where it would be too large, and what `Fonts` raises."""
    longest = max(map(len, picture.texts))
    if longest > FEW_TOKENS:
        raise SequenceTooLongError(f"{longest} tokens; a PNG holds {FEW_TOKENS}: give a part of the text.")
    fonts = Fonts(font)
    rows = [[_text(fonts, picture.title, TITLE, bold=True)], *_panels(picture, fonts), [_legend(picture, fonts)]]
    width = max(sum(block.width + MARGIN for block in row) for row in rows) + MARGIN
    heights = [max(block.height for block in row) + MARGIN for row in rows]
    return _painted(rows, max(width, NARROWEST_PIXELS), heights)


def _painted(rows: list[list[Block]], width: int, heights: list[int]) -> Image:
    from PIL import Image

    height = sum(heights) + MARGIN
    if width * height > MOST_PIXELS:
        raise SequenceTooLongError(
            f"{width} x {height} pixels; a PNG holds {MOST_PIXELS}: give a shorter text, or one layer or head."
        )
    image, y = Image.new("RGB", (width, height), LIGHT["paper"]), MARGIN
    for row, tall in zip(rows, heights, strict=True):
        x = MARGIN
        for block in row:
            block.paint(image, x, y)
            x += block.width + MARGIN
        y += tall
    return image


def _panels(picture: Picture, fonts: Fonts) -> Iterator[list[Block]]:
    """Yield rows of panels: full ones below each other, small ones a layer a row."""
    if sum(panel.weights is not None for panel in picture.panels) < GRID:
        for panel in picture.panels:
            yield [_text(fonts, panel.title, TEXT)]
            yield [_matrix(panel, picture.texts[panel.row], fonts)]
        return
    rows: dict[Any, list[Block]] = {}
    several = len({panel.head for panel in picture.panels}) > 1
    for index, panel in enumerate(picture.panels):
        rows.setdefault((panel.row, panel.layers) if several else index // 6, []).append(_small(panel, fonts))
    yield from rows.values()


def _text(fonts: Fonts, text: str, size: int, *, bold: bool = False) -> Block:
    written = fonts.written(text, size, LIGHT["ink"], bold=bold)
    return Block(*written.size, lambda image, x, y: image.paste(written, (x, y), written))


def _matrix(panel: Panel, tokens: Sequence[Token], fonts: Fonts) -> Block:
    """Labels to the left and, turned, above; then the cells."""
    cell = next(size for most, size in CELLS if len(tokens) <= most)
    every = -(-TEXT // cell) if cell < TEXT else 1
    labels = [
        (i, _label(fonts, token, "{label}  {number}"), _label(fonts, token, "{number}  {label}"))
        for i, token in enumerate(tokens)
        if i % every == 0
    ]
    side = max(label.width for _, label, _ in labels) + 12
    total = cell * len(tokens)

    def paint(image: Image, x: int, y: int) -> None:
        for index, label, above in labels:
            middle = round(index * cell + (cell * min(every, 1) - label.height) / 2)
            image.paste(label, (x + side - 12 - label.width, y + side + middle), label)
            turned = above.rotate(90, expand=True)
            image.paste(turned, (x + side + middle, y + side - 12 - turned.height), turned)
        _cells(image, panel, x + side, y + side, cell)

    return Block(side + total, side + total, paint)


def _label(fonts: Fonts, token: Token, order: str) -> Image:
    colour = "window" if token.is_control else "faint" if token.position is None else "ink"
    text = order.format(label=token.label, number="" if token.position is None else token.position)
    return fonts.written(text.strip(), TEXT, LIGHT[colour], longest=LONGEST_LABEL, bold=token.is_control)


def _small(panel: Panel, fonts: Fonts) -> Block:
    cell = max(1, GRID_PIXELS // len(panel.reasons))
    title = fonts.written(panel.title, TEXT, LIGHT["ink"], longest=GRID_PIXELS)
    total = max(cell * len(panel.reasons), title.width)

    def paint(image: Image, x: int, y: int) -> None:
        image.paste(title, (x, y), title)
        _cells(image, panel, x, y + title.height, cell)

    return Block(total, title.height + cell * len(panel.reasons), paint)


def _cells(image: Image, panel: Panel, x: int, y: int, cell: int) -> None:
    from PIL import ImageDraw

    pen, size = ImageDraw.Draw(image), len(panel.reasons)
    for query in range(size):
        for key in range(size):
            at = (x + key * cell, y + query * cell)
            reason = Reason(int(panel.reasons[query, key]))
            if panel.weights is None:
                _mark(pen, at, cell, reason, itself=query == key)
            elif reason is Reason.SEES:
                _square(pen, at, cell, weight_colour(float(panel.weights[query, key]), LIGHT))
            else:
                _mark(pen, at, cell, Reason.FUTURE)


def _mark(pen: ImageDraw, at: tuple[int, int], cell: int, reason: Reason, *, itself: bool = False) -> None:
    """A reason's colour and shape: filled, a dot, slanted or upright lines, a cross."""
    colour = LIGHT["self" if itself and reason is Reason.SEES else reason.name.lower()]
    (x, y), gap = at, max(1, cell // 16) if cell >= 6 else 0
    left, top, right, bottom = x + gap, y + gap, x + cell - gap - 1, y + cell - gap - 1
    third, thick = cell // 3, max(1, cell // 12)
    if cell >= 6 and reason in (Reason.WINDOW, Reason.DOCUMENT):
        _square(pen, at, cell, faded(colour))
    if reason is Reason.SEES or cell < 6:
        if reason is not Reason.FUTURE:
            _square(pen, at, cell, colour)
    elif reason is Reason.FUTURE:
        pen.ellipse((x + 3 * cell // 7, y + 3 * cell // 7, x + 4 * cell // 7, y + 4 * cell // 7), fill=colour)
    elif reason is Reason.PADDING:
        pen.line((x + third, y + third, x + 2 * third, y + 2 * third), colour, thick)
        pen.line((x + third, y + 2 * third, x + 2 * third, y + third), colour, thick)
    elif reason is Reason.WINDOW:
        middle = (left + right) // 2, (top + bottom) // 2
        for line in (
            (left, bottom, right, top),
            (left, middle[1], middle[0], top),
            (middle[0], bottom, right, middle[1]),
        ):
            pen.line(line, colour, thick)
    else:
        for column in (left + thick, (left + right) // 2, right - thick):
            pen.line((column, top, column, bottom), colour, thick)


def _square(pen: ImageDraw, at: tuple[int, int], cell: int, colour: str | tuple[int, int, int]) -> None:
    gap = max(1, cell // 16) if cell >= 6 else 0
    pen.rectangle((at[0] + gap, at[1] + gap, at[0] + cell - gap - 1, at[1] + cell - gap - 1), fill=colour)


def _legend(picture: Picture, fonts: Fonts) -> Block:
    """Squares and what they mean; of reasons, those that occur."""
    blocks = []
    if picture.panels[0].weights is not None:
        for step in STEPS:
            blocks.append(_entry(fonts, f"{step:g}", _square, weight_colour(step, LIGHT)))
    else:
        found = {Reason(int(v)) for panel in picture.panels for v in set(panel.reasons.ravel().tolist())}
        blocks = [_entry(fonts, STYLES[reason].title, _mark, reason) for reason in sorted(found)]
        if Reason.SEES in found:
            blocks.insert(1, _entry(fonts, "sees itself", _mark, Reason.SEES, itself=True))

    def paint(image: Image, x: int, y: int) -> None:
        for block in blocks:
            block.paint(image, x, y)
            x += block.width

    return Block(sum(block.width for block in blocks), TEXT + 8, paint)


def _entry(fonts: Fonts, title: str, drawn: Callable[..., None], what: Any, **options: Any) -> Block:
    """One square of the legend and its title; `drawn` is `_mark` or `_square`."""
    written = fonts.written(title, TEXT, LIGHT["faint"])

    def paint(image: Image, x: int, y: int) -> None:
        from PIL import ImageDraw

        drawn(ImageDraw.Draw(image), (x, y + 4), TEXT, what, **options)
        image.paste(written, (x + TEXT + 8, y), written)

    return Block(TEXT + 8 + written.width + MARGIN, TEXT + 8, paint)
