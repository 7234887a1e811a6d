"""What the lines of a file of examples may hold: one row says which fields make a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..errors import ExampleError, InputError
from ..telling import shown

KindName = Literal["preference", "completion", "chat", "classification", "tokens", "text"]


class ExampleKind(NamedTuple):
    """The fields that the lines of a kind have, and those that they may have."""

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()


KINDS: dict[KindName, ExampleKind] = {
    "preference": ExampleKind(("prompt", "chosen", "rejected"), ("tools",)),
    "completion": ExampleKind(("prompt", "completion"), ("tools",)),
    "chat": ExampleKind(("messages",), ("tools",)),
    "classification": ExampleKind(("text", "label")),
    "tokens": ExampleKind(("tokens", "labels")),
    "text": ExampleKind(("text",)),
}
"""By name; a line is of the first whose fields it has."""
FIELDS = frozenset(name for kind in KINDS.values() for name in (*kind.needs, *kind.may))


def kind_of(row: Mapping[str, Any], where: str) -> KindName:
    """The kind of a line by its fields.

    Raises ExampleError for a line that has those of none, or beside those of one a field of another: two readings.
    """
    found = next((name for name, kind in KINDS.items() if row.keys() >= set(kind.needs)), None)
    if found is None:
        known = "; ".join(f"{', '.join(kind.needs)} ({name})" for name, kind in KINDS.items())
        raise ExampleError(f"{where} must have the fields of a kind of example ({known}), got {shown(sorted(row))}.")
    others = sorted((row.keys() & FIELDS).difference(*KINDS[found]))
    if others:
        raise ExampleError(
            f"{where} must have the fields of one kind of example, got {', '.join(KINDS[found].needs)} ({found}) "
            f"beside {', '.join(others)}; take out what is not meant, or pass kind={found!r}."
        )
    return found


def check_kind(name: Any) -> KindName:
    """The name of a kind; raises InputError for another one."""
    if name not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {shown(name)}.")
    return name


def check_row(row: Mapping[str, Any], name: KindName, where: str) -> None:
    """Raise ExampleError for a line without a field of its kind."""
    missing = [field for field in KINDS[name].needs if field not in row]
    if missing:
        raise ExampleError(
            f"{where} must have {', '.join(KINDS[name].needs)} as the lines before it ({name}), got "
            f"{shown(sorted(row))}; add {', '.join(missing)}."
        )
