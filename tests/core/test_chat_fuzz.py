"""Any conversation, good or bad: our ids are those of mistral-common, or both refuse."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mistral_core.errors import TemplateError
from mistral_core.text.chat.json_schema import schema_problems
from mistral_core.text.chat.prompt import segments
from mistral_core.text.chat.versions import VERSIONS

pytest.importorskip("mistral_common")

from mistral_common_files import NAMES, SETTINGS, WEATHER, assert_same, oracle


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    return lambda name: oracle(name, directory)


SPELLED = [
    *("", " ", "a", "b  ", " c", "\n", "\u2581", "a[/INST] b</s>[INST] c", "<s>[TOOL_CALLS]", "[THINK]", "\u263a"),
    *('{"a":1}', '{"a": 22.0, "a": 1E5}', "[1,2]", "22.0", "NaN", "-Infinity", "1e999", "null", '"x"', '"\\u00e9"'),
    *("{", "1" * 30, '{"z": {"y": [true, null]}, "b": -0.0}', "null ", "\ufeff{}"),
]
TEXTS = st.sampled_from(SPELLED) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
IDS = st.sampled_from(["aaaaaaaaa", "bbbbbbbbb", "ccccccccc"])
ODD_IDS = IDS | st.sampled_from(["null", "", "short", None, "aaaaaaaaa\n", "a-b-c-d-e", 7])
FUNCTIONS = st.sampled_from(["get_weather", "f-1", "f-1", "f-1", "no spaces", "", "f\n", "x" * 65])


def rarely(usual, odd):
    """Odd at times, so that most conversations are good."""
    return st.integers(0, 30).flatmap(lambda dice: odd if dice == 23 else usual)


def fields(required, optional):
    """A dict that seldom lacks what it needs."""
    return rarely(
        st.fixed_dictionaries(required, optional=optional), st.fixed_dictionaries({}, optional={**required, **optional})
    )


THOUGHTS = fields({"type": st.just("thinking"), "thinking": TEXTS}, {"closed": st.booleans()})
CHUNKS = fields({"type": st.just("text"), "text": TEXTS}, {"cache": st.just(1)})
CONTENTS = rarely(TEXTS | st.lists(CHUNKS, max_size=3), st.lists(THOUGHTS | CHUNKS, max_size=3) | st.none() | DATA)
ANSWERS = rarely(TEXTS | st.lists(THOUGHTS | CHUNKS, max_size=3), st.none() | DATA)
ARGUMENTS = rarely(TEXTS | st.dictionaries(TEXTS, DATA, max_size=2), st.none() | DATA)
CALLED = fields({"name": rarely(st.just("get_weather"), FUNCTIONS), "arguments": ARGUMENTS}, {"other": DATA})
TYPES = rarely(st.just("function"), st.sampled_from([None, "custom"]))


@st.composite
def conversations(draw):
    """A walk over roles whose results mostly answer the calls before them; then, at times, nonsense in between."""
    messages, open_ids, role = [], [], None
    for _ in range(draw(rarely(st.integers(1, 7), st.just(0)))):
        after = {None: "sud", "s": "usa", "d": "ua", "u": "asu", "a": "ua", "t": "au"}[role]
        role = "t" if open_ids else draw(st.sampled_from(after))
        role = draw(rarely(st.just(role), st.sampled_from("sduat")))
        message = {"role": {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}[role]}
        if role == "a":
            calls = draw(rarely(st.sets(IDS, max_size=2), st.lists(ODD_IDS, max_size=2)))
            if draw(st.booleans()):
                calls = []
            open_ids = list(calls)
            made = [{"id": each, "function": draw(CALLED), **draw(fields({}, {"type": TYPES}))} for each in calls]
            if made or draw(st.booleans()):
                message["tool_calls"] = made
            if not made or draw(st.booleans()):
                message["content"] = draw(rarely(TEXTS, ANSWERS))
            if draw(st.integers(0, 9)) == 7:
                message[draw(st.sampled_from(["reasoning", "reasoning_content"]))] = draw(TEXTS | st.none())
        else:
            message["content"] = draw(CONTENTS)
        if role == "t":
            usual = open_ids.pop(draw(st.integers(0, len(open_ids) - 1))) if open_ids else "aaaaaaaaa"
            message["tool_call_id"] = draw(rarely(st.just(usual), ODD_IDS))
            if draw(st.booleans()):
                message["name"] = draw(rarely(st.just("get_weather"), FUNCTIONS | st.none()))
        if draw(st.integers(0, 30)) == 23:
            message = draw(st.sampled_from([{}, {"role": "critic", "content": "a"}, {**message, "role": "tool"}]))
        messages.append(message)
    if messages and draw(st.booleans()):
        messages.append({"role": "user", "content": draw(CONTENTS)})
    return messages


WORDS = [
    *("type", "properties", "required", "items", "enum", "const", "description", "pattern", "minimum", "maxLength"),
    *("anyOf", "not", "if", "dependencies", "patternProperties", "multipleOf", "uniqueItems", "$ref", "default"),
    *("additionalProperties", "definitions", "title", "minItems", "examples", "additionalItems", "format", "oneOf"),
]
LEAVES = st.one_of(
    st.sampled_from(
        ["string", "object", ["string", "null"], ["a", "a"], "^[a-z]+$", "(", 0, -1, 2.0, 1.5, True, {}, []]
    ),
    st.lists(st.sampled_from(["string", "city"]), max_size=2),
    st.none(),
)
SCHEMAS = st.recursive(
    st.dictionaries(st.sampled_from(WORDS), LEAVES, max_size=2),
    lambda inner: st.dictionaries(
        st.sampled_from(WORDS), inner | st.lists(inner, max_size=2) | LEAVES, min_size=1, max_size=2
    ),
    max_leaves=4,
)
TOOLS = st.one_of(
    st.none(),
    st.just([WEATHER]),
    st.lists(
        fields(
            {
                "function": fields(
                    {"name": rarely(st.just("f"), FUNCTIONS)},
                    {
                        "description": rarely(TEXTS, DATA),
                        "parameters": rarely(st.just({"type": "object"}), SCHEMAS | st.none()),
                        "strict": st.booleans() | st.none(),
                        "extra": DATA,
                    },
                )
            },
            {"type": TYPES, "extra": DATA},
        ),
        max_size=2,
    ),
)
OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["test", "test", "finetuning"]),
        "continue_final_message": rarely(st.just(False), st.just(True)),
    }
)


def same_everywhere(tokenizer, messages, tools, options):
    if messages and options["mode"] == "test" and messages[-1].get("role") == "assistant":
        options = {**options, "continue_final_message": True}
    for name in NAMES:
        found = assert_same(tokenizer(name), messages, tools, **options)
        event(f"{name}: {'refused' if isinstance(found, Exception) else 'written'}")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations(), TOOLS, OPTIONS)
def test_any_conversation_equals_mistral_common(tokenizer, messages, tools, options):
    same_everywhere(tokenizer, messages, tools, options)


@pytest.mark.sweep
@settings(max_examples=4_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversations(), TOOLS, OPTIONS)
def test_many_conversations_equal_mistral_common(tokenizer, messages, tools, options):
    same_everywhere(tokenizer, messages, tools, options)


@settings(deadline=None)
@given(DATA | conversations(), DATA, st.sampled_from([*VERSIONS]))
def test_nonsense_raises_nothing_else(messages, tools, version):
    with contextlib.suppress(TemplateError):
        segments(messages, tools, version=version, model_settings=SETTINGS)


@settings(max_examples=300, deadline=None)
@given(SCHEMAS)
def test_schemas_are_those_of_draft_7(schema):
    jsonschema = pytest.importorskip("jsonschema")
    try:
        jsonschema.Draft7Validator.check_schema(schema)
        wanted = True
    except jsonschema.SchemaError:
        wanted = False
    assert (not list(schema_problems(schema, "schema"))) == wanted
    event(f"a schema: {wanted}")
