"""Checks of plain data: each raises a Problem, and all problems of a conversation are told at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ...errors import TemplateError
from .. import utf8

T = TypeVar("T")


class Problem(Exception):
    """One thing that is wrong, said without the full stop; never leaves this package."""


@contextmanager
def as_template_error() -> Iterator[None]:
    """What a Problem inside becomes: a TemplateError."""
    try:
        yield
    except Problem as problem:
        raise TemplateError(f"{problem}.") from problem.__cause__


def collect(makers: Iterable[Callable[[], T]]) -> list[T]:
    """What each call makes; raises one TemplateError with the problems of all."""
    made, problems = [], []
    for make in makers:
        try:
            made.append(make())
        except Problem as problem:
            problems.append(str(problem))
    raise_all(problems)
    return made


def raise_all(problems: Iterable[str]) -> None:
    """Raise one TemplateError with all problems, if there are any."""
    found = list(problems)
    if found:
        raise TemplateError("; ".join(found) + ".")


def sequence(value: Any, where: str, wanted: str) -> Sequence[Any]:
    """The value if it is a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise Problem(f"{where} must be {wanted}, got {type(value).__name__}")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value if it is a dict."""
    if not isinstance(value, Mapping):
        raise Problem(f"{where} must be a dict, got {type(value).__name__}")
    return value


def field(value: Mapping[str, Any], name: str, where: str) -> Any:
    """A field that must be there."""
    if name not in value:
        raise Problem(f"{where}: no {name!r}; add it")
    return value[name]


def text(value: Any, where: str) -> str:
    """The value if it is a text that has a UTF-8 form."""
    if not isinstance(value, str):
        raise Problem(f"{where} must be a str, got {type(value).__name__}")
    if wrong := utf8.problem(value):
        raise Problem(f"{where}: {wrong}")
    return value


def as_json(value: Any, where: str) -> str:
    """JSON on one line as the models were trained on: a space after `,` and `:`, characters as they are."""
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as cause:
        raise Problem(f"{where}: cannot be written as JSON ({cause}); pass plain data") from cause
    return text(written, where)


def from_json(written: str, where: str) -> Any:
    """What a text says as JSON, {} where it is empty, and the text itself where it is no JSON."""
    if not written:
        return {}
    try:
        value = json.loads(written)
    except json.JSONDecodeError:
        return written
    except (ValueError, RecursionError) as cause:  # a number of thousands of digits, brackets without end
        raise Problem(f"{where}: JSON that cannot be read ({cause}); pass a smaller one") from cause
    as_json(value, where)
    return value
