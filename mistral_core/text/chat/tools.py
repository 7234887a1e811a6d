"""Definitions of tools, as the models read them."""

from __future__ import annotations

from functools import partial
from typing import Any

from .checks import Problem, as_json, as_template_error, collect, field, mapping, sequence, text
from .functions import function_schema
from .json_schema import schema_problems
from .messages import NAME


def definitions(tools: Any) -> str:
    """The JSON text of tools, "" of none: dicts as OpenAI writes them, or Python functions with hints and docstring.

    Other keys than type, name, description and parameters are left out. Raises one TemplateError with every tool
    that is malformed or whose parameters are no JSON Schema (Draft 7).
    """
    if tools is None:
        return ""
    with as_template_error():
        given = sequence(tools, "tools", "a list of definitions or functions")
        found = collect(partial(_definition, each, f"tools[{index}]") for index, each in enumerate(given))
        return as_json(found, "tools") if found else ""


def without_functions(tools: Any) -> Any:
    """Tools for a jinja template: each Python function as its definition, all else as it is, for the template to judge.

    Raises TemplateError for a function that says too little.
    """
    if not isinstance(tools, (list, tuple)):
        return tools
    with as_template_error():
        return [function_schema(each, f"tools[{i}]") if callable(each) else each for i, each in enumerate(tools)]


def _definition(given: Any, where: str) -> dict[str, Any]:
    fields = function_schema(given, where) if callable(given) else mapping(given, where)
    if fields.get("type", "function") != "function":
        raise Problem(f"{where}.type must be 'function', got {fields['type']!r}")
    where = f"{where}.function"
    function = mapping(field(fields, "function", where), where)
    name = text(field(function, "name", where), f"{where}.name")
    if not NAME.match(name):
        raise Problem(f"{where}.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, got {name!r}")
    if not isinstance(function.get("strict"), bool | None):
        raise Problem(f"{where}.strict must be true or false, got {function['strict']!r}")
    described, parameters = function.get("description"), function.get("parameters")
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "" if described is None else text(described, f"{where}.description"),
            "parameters": {} if parameters is None else checked_schema(parameters, f"{where}.parameters"),
        },
    }


def checked_schema(given: Any, where: str) -> dict[str, Any]:
    """The value if it is a JSON Schema by name."""
    schema = dict(mapping(given, where))
    try:
        problems = "; ".join(schema_problems(schema, where))
    except RecursionError as cause:
        raise Problem(f"{where}: nested without end; pass a plain schema") from cause
    if problems:
        raise Problem(problems)
    return schema
