"""The settings that a v15 prompt may tell the model: how much to reason, and the schema of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import TokenizerError
from .checks import Problem, as_json, field, mapping, text
from .tools import checked_schema

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ANY_JSON = {"anyOf": [{"type": "object"}, {"type": "array"}]}


def settings_text(rules: Mapping[str, Any] | None, *, reasoning_effort: str | None, response_format: Any) -> str:
    """The JSON of the settings, "" of none; `rules` is the section `model_settings_builder` of a tekken.json.

    Raises TokenizerError for a malformed section. What the model does not know cannot be set.
    """
    if rules is None:
        raise Problem("model_settings: None; pass the section model_settings_builder of tekken.json")
    schema = _answer_schema(response_format)
    knows_schema = rules.get("json_schema") is not None
    if schema is not None and not knows_schema:
        raise Problem("response_format: this model has no such setting; leave it out")
    effort = _effort(rules.get("reasoning_effort"), reasoning_effort)
    settings = {"json_schema": schema, "reasoning_effort": effort}
    as_template_error = {name: value for name, value in settings.items() if value is not None}
    return as_json(as_template_error, "response_format") if as_template_error else ""


def _effort(rule: Any, asked: str | None) -> str | None:
    if rule is None:
        if asked is not None:
            raise Problem(f"reasoning_effort: {asked!r}, but this model has no such setting; leave it out")
        return None
    values = rule.get("values") if isinstance(rule, Mapping) else None
    if not isinstance(values, list) or not set(map(str, values)) <= {*EFFORTS} or rule.get("default") not in values:
        raise TokenizerError(
            f"tekken.json: reasoning_effort of model_settings_builder must have `values` of {', '.join(EFFORTS)} and "
            f"one of them as `default`, got {rule!r:.80}; fetch the file again."
        )
    effort = rule["default"] if asked is None else asked
    if effort not in values:
        raise Problem(f"reasoning_effort must be one of {', '.join(values)}, got {asked!r}")
    return effort


def _answer_schema(given: Any) -> dict[str, Any] | None:
    """The schema that a `response_format` as OpenAI writes it asks for."""
    where = "response_format"
    if given is None:
        return None
    fields = mapping(given, where)
    kind, wrapped = fields.get("type", "text"), fields.get("json_schema")
    if kind not in ("text", "json_object", "json_schema"):
        raise Problem(f"{where}.type must be one of text, json_object, json_schema, got {kind!r}")
    if kind != "json_schema":
        return ANY_JSON if kind == "json_object" else None
    where = f"{where}.json_schema"
    named = mapping(wrapped, where)
    text(field(named, "name", where), f"{where}.name")
    return checked_schema(field(named, "schema", where), f"{where}.schema")
