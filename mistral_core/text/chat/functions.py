"""Python functions as tools: hints and a docstring in Google's form become a definition, as in transformers."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .checks import Problem

NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
"""Types of the values that JSON has -> their names in a schema."""
CONTAINERS = {list: "array", tuple: "array", dict: "object"}

DESCRIPTION = re.compile(r"^(.*?)\s*(?:Args:|Returns:|Raises:|\Z)", re.DOTALL)
ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)\s*(?:Returns:|Raises:|\Z)", re.DOTALL)
ARGUMENT = re.compile(r"^([ \t]*)(\w+):\s*(.*?)\s*(?=^(?!\1[ \t])[ \t]*\w+:|\Z)", re.DOTALL | re.MULTILINE)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any], where: str) -> dict[str, Any]:
    """The definition of a function; what it returns is not part of it.

    Every argument needs a hint (int, float, str, bool, list, tuple, dict, Literal, Any and unions of them) and a line
    under `Args:`, which may end in `(choices: ["a", "b"])`.
    """
    name = getattr(function, "__name__", "")
    where = f"{where} ({name or type(function).__name__})"
    doc = (inspect.getdoc(function) or "").strip()
    if not (name and doc):
        raise Problem(f"{where}: no name or no docstring; pass a function that has both, or a dict")
    lines = _argument_lines(doc)
    properties, required = _parameters(function, where)
    for argument, schema in properties.items():
        if argument not in lines:
            raise Problem(f"{where}: the docstring does not describe {argument!r}; add it under `Args:`")
        choices = CHOICES.search(lines[argument])
        if choices:
            schema["enum"] = _choices(choices.group(1), f"{where}: {argument}")
        schema["description"] = lines[argument][: choices.start()].strip() if choices else lines[argument]
    parameters = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    described = DESCRIPTION.search(doc)
    description = described.group(1).strip() if described else ""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _argument_lines(doc: str) -> dict[str, str]:
    """Argument -> its description on one line."""
    block = ARGUMENTS.search(doc)
    lines = "\n".join(line for line in block.group(1).split("\n") if line.strip()) if block else ""
    return {name: re.sub(r"\s*\n+\s*", " ", said) for _, name, said in ARGUMENT.findall(lines)}


def _parameters(function: Callable[..., Any], where: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Argument -> schema, and the arguments without a default."""
    try:
        hints, signature = get_type_hints(function), inspect.signature(function)
    except (NameError, TypeError, ValueError) as cause:
        raise Problem(f"{where}: its hints cannot be read ({cause}); pass a dict") from cause
    arguments = list(signature.parameters.values())
    if arguments and arguments[0].name in ("self", "cls") and arguments[0].annotation is inspect.Parameter.empty:
        del arguments[0]
    bare = [each.name for each in arguments if each.name not in hints]
    if bare:
        raise Problem(f"{where}: no hint of {', '.join(bare)}; add one")
    schemas = {each.name: _schema(hints[each.name], f"{where}: {each.name}") for each in arguments}
    return schemas, [each.name for each in arguments if each.default is inspect.Parameter.empty]


def _choices(written: str, where: str) -> list[Any]:
    try:
        choices = json.loads(written)
    except ValueError as cause:
        raise Problem(f"{where}: the choices {written!r:.80} are no JSON list; write them as one") from cause
    if not isinstance(choices, list):
        raise Problem(f"{where}: the choices {written!r:.80} are no JSON list; write them as one")
    return [each.strip() if isinstance(each, str) else each for each in choices]


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """The schema of a hint."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _union(args, where)
    if origin is Literal and all(type(each) in NAMES for each in args):
        kinds = list(dict.fromkeys(NAMES[type(each)] for each in args))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(args)}
    if isinstance(origin, type) and origin in NAMES:
        return {"type": NAMES[origin]}
    if not (isinstance(origin, type) and origin in CONTAINERS) or ... in args or (origin is tuple and len(args) == 1):
        raise Problem(f"{where}: no JSON Schema of the hint {hint!r}; use plain types, or pass a dict")
    inner = [_schema(each, where) for each in args]
    parts: dict[type, dict[str, Any]] = {
        list: {"items": inner[0] if inner else None},
        tuple: {"prefixItems": inner},
        dict: {"additionalProperties": inner[1] if len(inner) == 2 else None},
    }
    return {"type": CONTAINERS[origin], **(parts[origin] if args else {})}


def _union(args: tuple[Any, ...], where: str) -> dict[str, Any]:
    """One schema, a list of plain types, or `anyOf`; None makes it nullable."""
    inner = [_schema(each, where) for each in args if each is not type(None)]
    if len(inner) == 1:
        schema = inner[0]
    elif all(each.keys() == {"type"} and isinstance(each["type"], str) for each in inner):
        kinds = sorted({each["type"] for each in inner})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": inner}
    return {**schema, "nullable": True} if type(None) in args else schema
