"""Definitions of tools: JSON Schema by the meta-schema of Draft 7, and Python functions as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from mistral_core import MistralTokenizer
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import TemplateError
from mistral_core.text.chat.json_schema import KEYWORDS, schema_problems
from mistral_core.text.chat.tools import definitions


def test_every_keyword_of_draft_7_has_its_rule():
    jsonschema = pytest.importorskip("jsonschema")
    free = {"default", "const"}
    assert {*KEYWORDS} | free == {*jsonschema.Draft7Validator.META_SCHEMA["properties"]}
    values = [
        *(None, True, 0, -1, 1.0, 1.5, 0.0, float("nan"), float("inf"), 10**30, "", "(", "string", "object"),
        *([], ["a"], ["a", "a"], ["string"], ["string", "string"], [1], [{}], [True], [{"type": 1}], [["a"]]),
        *({}, {"a": {}}, {"a": 1}, {"a": ["b"]}, {"a": ["b", "b"]}, {"(": {}}, {"type": "string"}, {"type": []}),
    ]
    for keyword in KEYWORDS:
        for value in values:
            good = jsonschema.Draft7Validator(jsonschema.Draft7Validator.META_SCHEMA).is_valid({keyword: value})
            if keyword in ("pattern", "patternProperties"):
                good = good and value != "(" and value != {"(": {}}  # the format "regex", which is_valid leaves out
            assert (not list(schema_problems({keyword: value}, "schema"))) == good, (keyword, value)


# Python functions


def get_weather(city: str, unit: Literal["C", "F"] = "C", days: int | None = None) -> str:
    """The weather of a city.

    It is a forecast.

    Args:
        city: The city,
            and its country: as one text
        unit: The unit (choices: ["C", "F"])
        days: How many days
            ahead
    Returns:
        A sentence.
    """
    return ""


def everything(
    a: list[int], b: dict[str, float], c: tuple[int, str], d: int | str, e: list[str] | int, f: Any, g: bool,
    h: dict, i: list | None = None, j: Literal[1, "x", None] = 1, k: tuple = (),
):  # fmt: skip
    """Takes everything.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
        k: K
    """


def nothing():
    """Takes nothing"""


@pytest.mark.sweep  # transformers is slow to import
@pytest.mark.parametrize("function", [get_weather, everything, nothing])
def test_functions_become_the_definitions_of_transformers(function):
    get_json_schema = pytest.importorskip("transformers.utils").get_json_schema
    assert definitions([function]) == definitions([get_json_schema(function)])


def test_a_function_becomes_a_definition():
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city, and its country: as one text"},
            "unit": {"type": "string", "enum": ["C", "F"], "description": "The unit"},
            "days": {"type": "integer", "nullable": True, "description": "How many days ahead"},
        },
        "required": ["city"],
    }
    wanted = {
        "name": "get_weather",
        "description": "The weather of a city.\n\nIt is a forecast.",
        "parameters": parameters,
    }
    assert json.loads(definitions([get_weather])) == [{"type": "function", "function": wanted}]
    assert json.loads(definitions([nothing]))[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_a_jinja_template_gets_functions_as_definitions():
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ messages[0].content }}"
    say = [{"role": "user", "content": "Rain?"}]
    functions, definition = (get_weather, nothing), json.loads(definitions([nothing]))[0]
    said = tokenizer.apply_chat_template(say, tools=functions, chat_template=template, tokenize=False)
    assert said.count('"type": "function"') == 2
    mixed = tokenizer.apply_chat_template(say, tools=[get_weather, definition], chat_template=template, tokenize=False)
    assert mixed == said
    with pytest.raises(TemplateError, match="does not describe 'city'"):
        tokenizer.apply_chat_template(say, tools=[silent], chat_template=template, tokenize=False)


def bare(city):
    """Args:
    city: x"""


def custom(city: Path):
    """Args:
    city: x"""


def silent(city: str):
    """The weather."""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bare, r"tools\[0\] \(bare\): no hint of city; add one"),
        (custom, "no JSON Schema of the hint"),
        (silent, "does not describe 'city'"),
        (lambda: 0, "no docstring"),
        (Path, r"tools\[0\]"),
    ],
)
def test_functions_that_say_too_little_are_refused(function, message):
    with pytest.raises(TemplateError, match=message):
        definitions([function])
