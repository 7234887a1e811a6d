"""The chat template that is saved: transformers makes the same ids of a conversation as the built-in format.

data/templates/check_saved.py is what an interpreter with another transformers runs by hand.
"""

from __future__ import annotations

import json
import runpy
from functools import cache
from pathlib import Path

import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import TemplateError
from mistral_core.text.chat.versions import VERSIONS
from mistral_core.text.templates.prompt import render
from mistral_core.text.templates.saved import made
from mistral_core.text.tokenizer import MistralTokenizer

pytest.importorskip("mistral_common")
pytest.importorskip("transformers")

import published_files
import transformers
from mistral_common_files import FILES, WEATHER, newer_tekken
from test_chat import HELLO, TURNS, answer, call, result, said

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "tokenizer_cases.json").read_text())["cases"]
ids_of_transformers = runpy.run_path(str(DATA / "templates" / "check_saved.py"))["ids"]

PIECES = ("v1", "v2", "v3", "v7")
TEKKENS = ("tekken-v3", "tekken-v7", "tekken-v11", "tekken-v13", "tekken-v15")
NAMES = (*PIECES, *published_files.PUBLISHED, *TEKKENS)


# Conversations


def chat(messages, tools=None, *, mode="test", continued=False):
    """A conversation as it is given to both."""
    return {"messages": messages, "tools": tools, "continue_final_message": continued}, mode


def with_call(arguments="{}", told="sunny", **fields):
    """A conversation with a call of a tool and its result."""
    return [*HELLO, answer(call(arguments=arguments), **fields), result(content=told, name="get_weather")]


VECTORS = {
    f"{each['kind']} {each['name']}": chat(
        each["messages"], each["tools"], mode=each["mode"], continued=each["continue_final_message"]
    )
    for each in CASES
    if each["kind"].startswith("chat")
}
ODD = (
    "",
    " ",
    "  two  ",
    "\n",
    "x \n ",
    "\t\u00a0x",
    "\u2581 a",
    "日本 👨‍👩‍👧 e\u0301",
    "-",
    "'quoted' \"x\" \\ <b>&amp;",
    "{{ 1 }}",
)
TEXTS = {
    f"text {text!r}": chat([
        said("system", text), said("user", text), said("assistant", text + "a" + text), said("user", "x" + text)
    ])
    for text in ODD
}  # fmt: skip
CONTINUED = {
    f"continued {text!r}": chat([*HELLO, said("assistant", text)], continued=True)
    for text in ("a", " a", "a ", "  a b  ", "a\nb", "Hello", "\na", "a\n", "a\n ")
}
JSON = {
    f"JSON {text!r}": chat(with_call(text, text))
    for text in (
        "", "{}", '{"a": [1, "é"]}', '{ "b": 1}', "plain", "22", "-3", "22.5", "1_000", "007", "nan", "1.5e-07", "true",
        "null", "NaN", "True", "[1, 2]", "[]", "[", "{not JSON}", "[INFO] a [b]", '"q"', '"', '"a" and "b"', "1" * 400,
        '"a\\"b"', '{"a":1}', '{"a": 1.0e2}', '{"\\u00e9": 1}', " 22", "1e5", "[note] see [1]", '{"a": 1, "a": 2}',
    )
}  # fmt: skip
TOOLS = {
    f"tools {index}": chat([said("system", "s"), *HELLO, said("assistant", "a"), *HELLO], tools)
    for index, tools in enumerate((
        [], [WEATHER], [WEATHER, {"function": {"name": "f"}}],
        [{"type": "function", "function": {"name": "f", "description": None, "parameters": None, "strict": True}}],
        [{"extra": 1, "function": {"parameters": {"b": 1, "a": "é<"}, "description": 'a "b"', "name": "f", "x": 1}}],
    ))
}  # fmt: skip
OTHERS = {
    "developer": chat([said("developer", "d"), *HELLO]),
    "arguments that are a dict": chat(with_call({"city": "Zürich", "days": [1, 2.5, None]})),
    "text and a call": chat(with_call("{}", "x", content="t")),
    "calls and results, twice": chat([*with_call("{}", "a"), said("assistant", "b"), *with_call("{}", "c")], [WEATHER]),
    "finetuning on calls": chat([*HELLO, answer(call())], [WEATHER], mode="finetuning"),
}
TURN_CHATS = {
    name: each
    for title, turns in TURNS.items()
    for name, each in (
        (title, chat(turns, [WEATHER])),
        (f"{title}, continued", chat(turns, [WEATHER], continued=True)),
        (f"{title}, learnt from", chat([*turns, said("assistant", "z")], mode="finetuning")),
    )
}
CHATS = VECTORS | TEXTS | CONTINUED | JSON | TOOLS | OTHERS | TURN_CHATS

SPELLED = "a control token that a message spells is one"
RESPACED = "JSON in a text stands as it was written, where mistral-common reads and writes it"
NO_JSON = "a text that looks like JSON is taken for it"
CUT = "an answer to be continued that ends in a line break is cut before it"  # 4.56: in v1, if spaces are around it
NO_TEXT = "an answer without text cannot be continued"
JOINED = "a text after an open thought is encoded together with it"

UNEQUAL = {
    "chat inject": SPELLED,
    "chat inject_tool_result": SPELLED,
    "chat tool_args_unicode_escape": RESPACED,
    "results that are JSON": RESPACED,
    "results that are JSON, learnt from": RESPACED,
    "JSON '{ \"b\": 1}'": RESPACED,
    "JSON '{\"a\":1}'": RESPACED,
    "JSON '{\"a\": 1.0e2}'": RESPACED,
    "JSON '{\"\\\\u00e9\": 1}'": RESPACED,
    "JSON ' 22'": RESPACED,
    "JSON '1e5'": RESPACED,
    'JSON \'{"a": 1, "a": 2}\'': RESPACED,
    "JSON '[note] see [1]'": NO_JSON,
    "continued 'a\\n'": CUT,
    "continued 'a\\n '": CUT,
    "no id, continued": NO_TEXT,
    "an open thought, continued": NO_TEXT,
    "an open thought, learnt from": JOINED,
}
"""What no template can write as mistral-common does, and why; what is spelled is text in our own sandbox."""


# Tokenizers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (ours, ours read again, transformers' of the directory)."""

    @cache
    def make(name):
        source, directory = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-saved")
        if name in published_files.PUBLISHED:
            (source / "tokenizer.json").write_bytes(published_files.published(name))
            if name != "v0.3":  # base models of v1 have the same file: it is not known that it is for conversations
                prefix = "always" if name.endswith("2023") else "first"
                (source / "chat_template.jinja").write_text(made("v1", prefix=prefix))
        elif name in TEKKENS:
            (source / "tekken.json").write_text(json.dumps(small_tekken(name.removeprefix("tekken-"))))
        ours = MistralTokenizer.from_pretrained(FILES[name] if name in PIECES else source)
        assert str(directory / "chat_template.jinja") in ours.save_pretrained(directory)
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        return ours, MistralTokenizer.from_pretrained(directory), theirs

    return make


def small_tekken(version):
    """The content of a tekken.json of 4000 words."""
    content = newer_tekken(version)
    config = {**content["config"], "default_vocab_size": 5000}
    return {**content, "vocab": content["vocab"][:4000], "config": config}


def ours_of(tokenizer, given, mode, **options):
    """Our ids, or the error."""
    tokenizer.mode = mode
    arguments = {**given, **options}
    try:
        return tokenizer.apply_chat_template(arguments.pop("messages"), **arguments)
    except TemplateError as error:
        return error


# What transformers makes of it


@pytest.mark.parametrize("name", NAMES)
def test_transformers_makes_the_same_ids(saved, name):
    assert set(UNEQUAL) <= set(CHATS)
    ours, again, theirs = saved(name)
    compared = 0
    for title, (given, mode) in CHATS.items():
        wanted = ours_of(ours, given, mode)
        if not isinstance(wanted, list):
            continue
        assert ours_of(again, given, mode) == wanted, title
        if UNEQUAL.get(title) in (None, SPELLED):
            assert ours_of(again, given, mode, chat_template="own") == wanted, title
        if title not in UNEQUAL:
            assert ids_of_transformers(theirs, given) == wanted, title
            compared += 1
    assert compared >= 80


def test_every_difference_is_one(saved):
    for title, reason in UNEQUAL.items():
        given, mode = CHATS[title]
        found = [(ours_of(saved(name)[0], given, mode), saved(name)[2]) for name in ("v2", "v3", "tekken-v13")]
        wanted = [(ids, theirs) for ids, theirs in found if isinstance(ids, list)]
        assert any(ids_of_transformers(theirs, given) != ids for ids, theirs in wanted), (title, reason)


@pytest.mark.parametrize("name", NAMES)
def test_118_a_spelled_control_token_is_text_where_transformers_is_told_so(saved, name):
    ours, _, theirs = saved(name)
    given, mode = CHATS["chat inject"]
    assert ids_of_transformers(theirs, {**given, "sanitize_control_tokens": True}) == ours_of(ours, given, mode)


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return city


@pytest.mark.parametrize("name", ["v3", "tekken-v13"])
def test_functions_as_tools(saved, name):
    ours, _, theirs = saved(name)
    given, mode = chat(HELLO, [get_weather])
    assert ids_of_transformers(theirs, given) == ours_of(ours, given, mode)


@pytest.mark.parametrize("name", ["v2", "v3", "v7", "tekken-v11", "tekken-v13"])
@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "list index|at least one message|empty"),
        ([said("critic", "x")], "The role of a message"),
        ([said("assistant", "a")], "begins with a message of user or system"),
        ([result(), *HELLO], "begins with a message of user or system"),
        ([*HELLO, result()], "A message of tool cannot come after one of user"),
        ([*HELLO, said("assistant", "a"), said("system", "s")], "A message of system cannot come after"),
        ([*with_call(), said("system", "s")], "A message of system cannot come after one of tool"),
        ([*HELLO, answer(call()), said("user", "a"), said("assistant", "b"), *HELLO], "Each call of a tool has one"),
        ([*HELLO, answer()], "not both|without content"),
        ([*HELLO, {"role": "assistant", "content": None}, *HELLO], "not both|without content"),
        ([{"role": "user"}], "The content of a message is"),
        ([{"role": "user", "content": [{"type": "image"}]}], "A chunk of type image"),
        ([*HELLO, answer(call("")), result("")], "The id of a call is"),
    ],
)
def test_122_what_ours_refuses_the_template_refuses(saved, name, messages, words):
    ours, _, theirs = saved(name)
    given, mode = chat(messages)
    refused = isinstance(ours_of(ours, given, mode), TemplateError) or messages[:1] == [result()]
    found = ids_of_transformers(theirs, given)
    assert isinstance(found, str) is refused
    assert not refused or any(each in found for each in words.split("|")), found


def test_122_an_answer_is_not_answered(saved):
    given, _ = chat([*HELLO, said("assistant", "a")])
    found = ids_of_transformers(saved("v3")[2], {**given, "add_generation_prompt": True})
    assert "The last message is an answer" in found


# The files


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("prefix", [None, "always", "first"])
def test_a_template_holds_what_its_version_has(version, prefix):
    text = made(version, prefix=prefix, model_settings={})
    tokens = {"[SYSTEM_PROMPT]": ("v7", "v11", "v13", "v15"), "[CALL_ID]": ("v11",), "[THINK]": ("v13", "v15")}
    tokens |= {"[AVAILABLE_TOOLS]": tuple(VERSIONS)[1:], "[TOOL_CONTENT]": ("v7", "v11")}
    assert {each for each in tokens if each in text} == {each for each, own in tokens.items() if version in own}
    assert "<%" not in text
    assert "<<" not in text
    spaced = prefix == "first"
    plain = " [INST] Hello [/INST]" if spaced else "[INST] Hello [/INST]"
    wanted = plain if version == "v1" else "[INST] Hello[/INST]" if spaced else "[INST]Hello[/INST]"
    assert render(text, messages=HELLO, bos_token="<s>", eos_token="</s>") == f"<s>{wanted}"


def test_v15_tells_the_settings_that_the_model_begins_with():
    settings = {"reasoning_effort": {"type": "enum", "values": ["none", "high"], "default": "high"}}
    written = '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS]'
    for version in VERSIONS:
        text = made(version, prefix=None, model_settings=settings)
        assert (written in render(text, messages=HELLO, bos_token="<s>")) is (version == "v15")


def test_a_template_of_the_checkpoint_stays(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(published_files.published("v0.3"))
    (tmp_path / "chat_template.jinja").write_text("its own")
    MistralTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "its own"


def test_a_base_model_gets_no_template(tmp_path):
    MistralTokenizer.from_pretrained(TINY_CHECKPOINT).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_versions_that_are_none():
    with pytest.raises(TemplateError, match="version must be one of v1, .* got 'v4'"):
        made("v4", prefix=None)
