"""The numbers of a run as curves: a page that needs nothing beside it, and an image, with the same lines in both."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..pictures.fonts import Fonts
from ..pictures.palette import LIGHT

WIDTH, HEIGHT = 900, 260
"""Pixels of a chart."""
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 40, 36
"""Pixels around what is drawn."""
POINTS = 800
"""The most points of a curve: of more steps, each is the mean of some."""
TICKS = 5
"""Lines across a chart, about so many."""
COLOURS = (LIGHT["sees"], LIGHT["window"])
"""Of a curve, and of a second one in the same chart."""
TEXT = 15
"""Pixels that letters are high."""


class Curve(NamedTuple):
    """Points of one kind of number."""

    name: str
    steps: Array
    values: Array


class Chart(NamedTuple):
    """Some curves over the steps, in one scale."""

    title: str
    curves: tuple[Curve, ...]

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The first and last step, and the lowest and highest mark."""
        steps = np.concatenate([curve.steps for curve in self.curves])
        marks = self.marks
        return float(min(steps.min(), 1)), float(max(steps.max(), 2)), marks[0], marks[-1]

    @property
    def marks(self) -> list[float]:
        """Round numbers that reach over all values."""
        values = np.concatenate([curve.values for curve in self.curves])
        low, high = float(values.min()), float(values.max())
        span = high - low or abs(high) or 1.0
        size = 10.0 ** math.floor(math.log10(span / TICKS))
        step = next(size * times for times in (1, 2, 5, 10) if span / (size * times) <= TICKS)
        first, last = math.floor(low / step), math.ceil(high / step)
        return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]

    def points(self, curve: Curve) -> list[tuple[float, float]]:
        """Where a curve goes, in pixels of the chart; of one point, to it again."""
        found = [self.place(step, value) for step, value in zip(curve.steps, curve.values, strict=True)]
        return found * 2 if len(found) == 1 else found

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Where a value of a step is, in pixels of the chart."""
        first, last, low, high = self.bounds
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(float(x), 1), round(float(y), 1)


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of a run's metrics: loss, learning rate, tokens a second; those of which there is something."""
    steps = [line for line in metrics if "loss" in line]
    speed: Callable[[Mapping[str, Any]], float] = lambda line: line["tokens"] / max(line["seconds"], 1e-9)  # noqa: E731
    found = [
        Chart("loss", (_curve("training", steps, lambda line: line["loss"]), _measured(metrics, "validation_loss"))),
        Chart("right, share", (_measured(metrics, "validation_right"),)),
        Chart("learning rate", (_curve("learning rate", steps, lambda line: line["rate"]),)),
        Chart("tokens a second", (_curve("tokens a second", steps, speed),)),
    ]
    kept = [chart._replace(curves=tuple(curve for curve in chart.curves if len(curve.steps))) for chart in found]
    return [chart for chart in kept if chart.curves]


def _measured(metrics: Sequence[Mapping[str, Any]], name: str) -> Curve:
    return _curve("validation", [line for line in metrics if name in line], lambda line: line[name])


def _curve(name: str, lines: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> Curve:
    """The values of lines, neighbours put together where there are many."""
    together = -(-len(lines) // POINTS) or 1
    parts = [lines[at : at + together] for at in range(0, len(lines), together)]
    steps = np.array([np.mean([line["step"] for line in part]) for part in parts], np.float64)
    return Curve(name, steps, np.array([np.mean([value(line) for line in part]) for part in parts], np.float64))


def page(charts: Sequence[Chart], title: str) -> str:
    """An HTML page with all charts in it, and nothing that it fetches."""
    name = html.escape(title)
    drawn = "\n".join(_svg(chart) for chart in charts) or "<p>No step yet.</p>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>body{{font:{TEXT}px sans-serif;margin:2em;background:{LIGHT['paper']};color:{LIGHT['ink']}}}"
        f"svg{{display:block;max-width:100%;margin-bottom:1em}}text{{fill:{LIGHT['ink']}}}</style></head>\n"
        f"<body><h1>{name}</h1>\n{drawn}\n</body></html>\n"
    )


def _svg(chart: Chart) -> str:
    parts = [f'<text x="{LEFT}" y="{TOP - 16}" font-weight="bold">{html.escape(chart.title)}</text>']
    for mark in chart.marks:
        _, y = chart.place(0, mark)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{LIGHT["line"]}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end">{_number(mark)}</text>')
    first, last, low, _ = chart.bounds
    for step, anchor in ((first, "start"), (last, "end")):
        x, _ = chart.place(step, low)
        parts.append(f'<text x="{x}" y="{HEIGHT - 12}" text-anchor="{anchor}">step {step:g}</text>')
    for number, (curve, colour) in enumerate(zip(chart.curves, COLOURS, strict=False)):
        line = " ".join(f"{x},{y}" for x, y in chart.points(curve))
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-linecap="round"/>'
        )
        if len(chart.curves) > 1:
            x = WIDTH - RIGHT - 100 * (len(chart.curves) - number)
            parts.append(f'<text x="{x}" y="{TOP - 16}" style="fill:{colour}">{html.escape(curve.name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'


def png(charts: Sequence[Chart]) -> bytes:
    """The same as an image. Raises MissingExtraError without Pillow."""
    fonts = Fonts()
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT * max(len(charts), 1)), LIGHT["paper"])
    draw = ImageDraw.Draw(image)

    def write(text: str, x: float, y: float, colour: str = LIGHT["ink"], *, end: bool = False) -> None:
        written = fonts.written(text, TEXT, colour)
        image.paste(written, (round(x) - (written.width if end else 0), round(y)), written)

    for row, chart in enumerate(charts):
        down = row * HEIGHT
        write(chart.title, LEFT, down + 10)
        for mark in chart.marks:
            _, y = chart.place(0, mark)
            draw.line((LEFT, down + y, WIDTH - RIGHT, down + y), fill=LIGHT["line"])
            write(_number(mark), LEFT - 8, down + y - 10, end=True)
        first, last, low, _ = chart.bounds
        for step, end in ((first, False), (last, True)):
            write(f"step {step:g}", chart.place(step, low)[0], down + HEIGHT - BOTTOM + 8, end=end)
        for number, (curve, colour) in enumerate(zip(chart.curves, COLOURS, strict=False)):
            places = [(x, down + y) for x, y in chart.points(curve)]
            draw.line(places, fill=colour, width=2)
            draw.ellipse((places[-1][0] - 2, places[-1][1] - 2, places[-1][0] + 2, places[-1][1] + 2), fill=colour)
            if len(chart.curves) > 1:
                write(curve.name, WIDTH - RIGHT - 100 * (len(chart.curves) - number), down + 10, colour)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _number(value: float) -> str:
    return f"{value:.6g}"
