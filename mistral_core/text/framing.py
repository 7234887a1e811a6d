"""The post-processor of a tokenizer.json that puts special tokens around a text, and between two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .rows import Frame


def post_processor(frame: Frame, token: Callable[[int], str]) -> dict[str, Any] | None:
    """A frame as a tokenizer.json has it, by the token of an id; None where there is nothing around a text."""
    if not any(frame):
        return None
    names = {each: token(each) for part in frame for each in part}

    def special(ids: list[int], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[each], "type_id": kind}} for each in ids]

    first = [*special(frame.before, 0), {"Sequence": {"id": "A", "type_id": 0}}]
    second = [*special(frame.between, 1), {"Sequence": {"id": "B", "type_id": 1}}, *special(frame.after, 1)]
    return {
        "type": "TemplateProcessing",
        "single": [*first, *special(frame.after, 0)],
        "pair": [*first, *second],
        "special_tokens": {name: {"id": name, "ids": [each], "tokens": [name]} for each, name in names.items()},
    }
