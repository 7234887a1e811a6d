"""What an assistant said, found again in what a template wrote: between two characters that nothing else has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import TemplateError
from ..segments import Part, Segment, length

NOT_ASKED = ("", "")
"""In the place of the two characters."""


def check_tag(template: str) -> None:
    """Raise TemplateError for a template that marks nothing as an assistant's."""
    if not re.search(r"\{%[-+]?\s*generation\b", template):
        raise TemplateError(
            "return_assistant_tokens_mask: the chat template marks nothing with {% generation %}; add it around what "
            "the assistant says, or leave the mask out."
        )


def without_ends(text: str, ends: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and where they stood; the last one is open where the text breaks off in it.

    Raises TemplateError for marks that are not in pairs.
    """
    if ends == NOT_ASKED:
        return text, []
    begin, end = ends
    parts, spans, at, opened = [], list[tuple[int, int]](), 0, list[int]()
    for part in re.split(f"([{begin}{end}])", text):
        if part == begin:
            opened.append(at)
        elif part == end and opened:
            spans.append((opened.pop(), at))
        elif part == end:
            raise TemplateError("chat template: an end of {% generation %} without a beginning; correct the template.")
        else:
            parts.append(part)
            at += len(part)
    spans += [(start, at) for start in opened]
    return "".join(parts), spans


def with_spans(segments: Iterable[Segment], spans: Iterable[tuple[int, int]]) -> list[Part]:
    """Segments and which characters of each stand in the spans, which count those of all."""
    found, at, listed = [], 0, list(spans)
    for segment in segments:
        size = length(segment)
        inside = ((max(first - at, 0), min(last - at, size)) for first, last in listed)
        found.append(Part(segment, tuple((first, last) for first, last in inside if first < last)))
        at += size
    return found
