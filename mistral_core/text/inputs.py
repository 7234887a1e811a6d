"""What a user may pass to a tokenizer, checked: texts, ids, lengths."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from ..errors import TokenizerError
from ..telling import nearest, shown, warn
from . import utf8
from .rows import PADDINGS, TRUNCATIONS, Limits, RowOptions

UNBOUNDED = 10**18
"""A `model_max_length` above this says nothing; transformers writes 1e30."""


class TokenIndexError(TokenizerError, IndexError):
    """An id that is not in the vocabulary."""


class Defaults(Protocol):
    """What a tokenizer says where options do not."""

    model_max_length: int
    padding_side: str


def limits_of(defaults: Defaults, options: RowOptions) -> Limits:
    """The lengths that options ask for; raises TokenizerError for what makes no sense."""
    padding = choice("padding", options.get("padding", False), PADDINGS)
    truncation = choice("truncation", options.get("truncation"), TRUNCATIONS)
    limit, multiple = options.get("max_length"), options.get("pad_to_multiple_of")
    multiple = 1 if multiple is None else check_integer("pad_to_multiple_of", multiple, 1)
    if limit is not None:
        limit = check_integer("max_length", limit, 0)
        if padding is None and options.get("truncation") is None:
            truncation = "longest_first"
            if options.get("verbose", True):
                warn("max_length cuts texts; say truncation=True, or leave it out.")
    elif defaults.model_max_length < UNBOUNDED:
        limit = int(defaults.model_max_length)
    elif padding == "max_length" or truncation is not None:
        raise TokenizerError("max_length: None, and the tokenizer's files name none; pass the length that is meant.")
    if padding and truncation and limit is not None and limit % multiple:
        raise TokenizerError(f"max_length: {limit}, no multiple of pad_to_multiple_of, {multiple}; choose one that is.")
    side = options.get("padding_side")
    side = check_side("padding_side", defaults.padding_side if side is None else side)
    return Limits(padding, truncation, limit, check_integer("stride", options.get("stride", 0), 0), multiple, side)


def choice(name: str, value: Any, known: dict[Any, Any]) -> Any:
    """What an argument's value stands for; raises TokenizerError naming the values there are."""
    value = getattr(value, "value", value)  # an enum of transformers
    if (value is None or isinstance(value, bool | str)) and value in known:
        return known[value]
    raise TokenizerError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}.")


def check_side(name: str, side: Any) -> str:
    """The side; raises TokenizerError for another."""
    if side not in ("left", "right"):
        raise TokenizerError(f"{name} must be 'left' or 'right', got {shown(side)}.")
    return str(side)


def check_integer(name: str, value: Any, least: int) -> int:
    """An integer; raises TokenizerError for less than `least` and for anything else."""
    number = integer(value)
    if number is None or number < least:
        raise TokenizerError(f"{name} must be an integer of at least {least}, got {shown(value)}.")
    return number


def integer(value: Any) -> int | None:
    """Python's own number for an integer of any library, an array of one without dimensions too; None for others."""
    if isinstance(value, bool | np.bool_) or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def refuse(where: str, arguments: Mapping[str, Any], known: Iterable[str] = ()) -> None:
    """Raise TokenizerError naming arguments that mean nothing here, and the nearest of those that do."""
    if arguments:
        told = ", ".join(f"{name}{nearest(name, known)}" for name in arguments)
        raise TokenizerError(f"{where} does not take {told}; leave it out.")


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def is_ids(text: Any) -> bool:
    """Whether this is one sequence of ids; no ids at all are a batch of no texts."""
    return isinstance(text, list | tuple) and bool(text) and integer(text[0]) is not None


def plain(value: Any) -> Any:
    """Lists of what may be an array of any framework, or a table's column; other things as they are."""
    is_array = hasattr(value, "shape") and (hasattr(value, "tolist") or hasattr(value, "numpy"))
    return listed(value) if is_array else value


def several(name: str, texts: Any) -> list[Any]:
    """The texts of a batch."""
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise TokenizerError(f"{name} must be a str or a list of them, got {type(texts).__name__}; decode bytes first.")
    return list(texts)


def listed(value: Any) -> Any:
    """A list of what may be an array of any framework."""
    given = value.numpy() if hasattr(value, "numpy") and not hasattr(value, "tolist") else value  # TensorFlow
    return given.tolist() if hasattr(given, "tolist") else [plain(each) for each in given]


def check_text(name: str, text: Any) -> str:
    """A text that can be written in UTF-8; raises TokenizerError for anything else."""
    if not isinstance(text, str):
        raise TokenizerError(f"{name} must be a str, got {type(text).__name__}; decode bytes first.")
    if wrong := utf8.problem(text):
        raise TokenizerError(f"{name}: {wrong}.")
    return text


def check_ids(ids: int | Iterable[int], size: int) -> list[int]:
    """Ids in [0, size), of a single id, a list or an array; raises TokenizerError, which is an IndexError if beyond."""
    if integer(ids) is None and not hasattr(ids, "__iter__"):
        raise TokenizerError(f"ids must be an integer, or a list or an array of them, got {shown(ids)}.")
    sequence = [ids] if integer(ids) is not None else listed(ids)
    checked = []
    for at, each in enumerate(sequence):
        number = each if type(each) is int else integer(each)
        if number is None:
            raise TokenizerError(f"ids[{at}] must be an integer, got {shown(each)}: decode row by row.")
        if not 0 <= number < size:
            raise TokenIndexError(f"ids[{at}]: {shown(number)} is not in [0, {size}); take the tokenizer of the model.")
        checked.append(number)
    return checked
