"""JSON Schema, Draft 7: is a schema one? The table is the meta-schema of the draft.

The package jsonschema would say the same of one schema; it brings a compiled package with it, and everybody has chat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def schema_problems(schema: Any, where: str) -> Iterator[str]:
    """What keeps a value from being a JSON Schema, each with the place where it stands."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield f"{where} must be a schema (a dict or a bool), got {type(schema).__name__}"
        return
    for keyword, value in schema.items():
        rule = KEYWORDS.get(keyword)
        if rule is not None:
            yield from rule(value, f"{where}.{keyword}")


Rule = Callable[[Any, str], Iterator[str]]


def _is(wanted: str, holds: Callable[[Any], bool]) -> Rule:
    def rule(value: Any, where: str) -> Iterator[str]:
        if not holds(value):
            yield f"{where} must be {wanted}, got {value!r:.80}"

    return rule


def _either(first: Rule, second: Rule, *, by: type) -> Rule:
    """The second rule for values of a type, the first for all others."""
    return lambda value, where: (second if isinstance(value, by) else first)(value, where)


def _schemas(value: Any, where: str) -> Iterator[str]:
    if not (isinstance(value, list) and value):
        yield f"{where} must be a list of schemas, got {value!r:.80}"
        return
    for index, each in enumerate(value):
        yield from schema_problems(each, f"{where}[{index}]")


def _named(rule: Rule, *, patterns: bool = False) -> Rule:
    """A dict whose values follow a rule, and whose keys are patterns or any names."""

    def named(value: Any, where: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{where} must be a dict, got {type(value).__name__}"
            return
        for name, each in value.items():
            if patterns:
                yield from _pattern(name, where)
            yield from rule(each, f"{where}.{name}")

    return named


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == value // 1 and value >= 0 and value != float("inf")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value) and len(set(value)) == len(value)


def _are_types(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else bool(value) and _are_names(value) and set(value) <= {*TYPES}


_pattern = _is("a regular expression", _is_pattern)
_text = _is("a str", lambda value: isinstance(value, str))
_flag = _is("true or false", lambda value: isinstance(value, bool))
_list = _is("a list", lambda value: isinstance(value, list))
_number = _is("a number", _is_number)
_count = _is("a whole number of at least 0", _is_count)
_names = _is("a list of different names", _are_names)
_schema_or_list = _either(schema_problems, _schemas, by=list)
_schema_or_names = _either(schema_problems, _names, by=list)

KEYWORDS: dict[str, Rule] = {
    **dict.fromkeys(
        ("$id", "$schema", "$ref", "$comment", "title", "description", "format", "contentMediaType", "contentEncoding"),
        _text,
    ),
    **dict.fromkeys(("readOnly", "uniqueItems"), _flag),
    **dict.fromkeys(("examples", "enum"), _list),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"), _number),
    **dict.fromkeys(("maxLength", "minLength", "maxItems", "minItems", "maxProperties", "minProperties"), _count),
    **dict.fromkeys(
        ("additionalItems", "contains", "additionalProperties", "propertyNames", "if", "then", "else", "not"),
        schema_problems,
    ),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _schemas),
    **dict.fromkeys(("definitions", "properties"), _named(schema_problems)),
    "patternProperties": _named(schema_problems, patterns=True),
    "dependencies": _named(_schema_or_names),
    "multipleOf": _is("a number above 0", lambda value: _is_number(value) and not value <= 0),
    "pattern": _pattern,
    "items": _schema_or_list,
    "required": _names,
    "type": _is(f"one or a list of {', '.join(TYPES)}", _are_types),
}
"""Keyword -> the rule of its value; other keywords are free."""
