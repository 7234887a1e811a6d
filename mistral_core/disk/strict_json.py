"""JSON as configs and indexes must be: UTF-8, bounded, no duplicate keys, no NaN, an object at the top."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MistralError
from . import limits, reading

MAX_DEPTH = limits.JSON_DEPTH
MAX_BYTES = limits.JSON_BYTES


def read_object(
    path: str | os.PathLike[str], *, error: type[MistralError], max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises CheckpointNotFoundError, LimitExceededError (size), UnsafeFileError (no file), and `error` for everything
    malformed.
    """
    path = path if isinstance(path, Path) else Path(path)
    try:
        data = reading.read(path, limit=max_bytes, what=" of JSON")
    except CheckpointError as cause:
        if cause.errno == errno.EACCES:
            raise error(f"{path} must be a JSON file that can be read (Permission denied).") from cause
        raise
    return parse_object(data, where=str(path), error=error)


def parse_object(
    data: bytes, *, where: str, error: type[MistralError], depth: int = MAX_DEPTH, is_line: bool = False
) -> dict[str, Any]:
    """Parse bytes whose top level is a JSON object; `where` names them, or their line, in errors of type `error`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: not UTF-8 at byte {cause.start}; save the file as UTF-8.") from cause
    too_deep = f"{where}: nested deeper than {depth} levels, as nothing that is read here is; take it apart."

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        if twice:
            raise error(f"{where}: the keys {twice[:20]} appear twice; keep one of each.")
        return dict(pairs)

    def refuse_constant(name: str) -> float:
        raise error(f"{where}: {name} is not a JSON number; write a finite one.")

    def finite(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise error(f"{where}: {text[:40]} is beyond float64; write a finite number.")
        return value

    def bounded(text: str) -> int:
        if len(text) > 20:
            raise error(f"{where}: an integer of {len(text)} digits; at most 20 make sense here.")
        return int(text)

    try:
        value = json.loads(
            text,
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
            parse_int=bounded,
        )
    except json.JSONDecodeError as cause:
        place = f"column {cause.colno}" if is_line else f"line {cause.lineno}, column {cause.colno}"
        raise error(f"{where}: not valid JSON at {place}: {cause.msg}.") from cause
    except RecursionError as cause:
        raise error(too_deep) from cause
    if _is_deeper([value], depth):
        raise error(too_deep)
    if not isinstance(value, dict):
        raise error(f"{where}: the top level must be a JSON object, got {type(value).__name__}.")
    if _has_surrogate(text, value):
        raise error(f"{where}: holds a lone surrogate (\\ud800 to \\udfff); remove it.")
    return value


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper, found without recursion."""
    level = [value]
    for _ in range(most + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [item for item in each.values() if isinstance(item, (dict, list))]
            elif isinstance(each, list):
                inner += [item for item in each if isinstance(item, (dict, list))]
        level = inner
    return bool(level)


def _has_surrogate(text: str, value: Any) -> bool:
    if "\\u" not in text:
        return False
    decoded = json.dumps(value, ensure_ascii=False)
    return any("\ud800" <= char <= "\udfff" for char in decoded)
