"""mistral-common as the judge: the tokenizers it ships, tekken files of newer versions made from one, its ids."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from mistral_core.errors import TemplateError
from mistral_core.text.chat.prompt import segments
from mistral_core.text.segments import Control, Infill, Segment

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v2": DATA / "mistral_instruct_tokenizer_240216.model.v2",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "v7": DATA / "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": DATA / "tekken_240718.json",
}
NAMES = (*FILES, "tekken-v7", "tekken-v11", "tekken-v13", "tekken-v15")
"""What `oracle` makes, but for the released tokenizer of 7B-v0.3."""
RELEASED_7B = FILES["v2"]
"""tokenizer.model.v3 of Mistral-7B-v0.3, byte for byte."""
NAMED = {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]"}
SETTINGS_TOKENS = {36: "[MODEL_SETTINGS]", 37: "[/MODEL_SETTINGS]"}
SETTINGS = {
    "reasoning_effort": {"type": "enum", "accepts_none": True, "values": ["none", "high"], "default": "none"},
    "json_schema": {"type": "json_schema", "accepts_none": False, "default": None},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
"""A tool as OpenAI writes it."""


@cache
def _tekken() -> dict:
    return json.loads(FILES["tekken"].read_bytes())


def newer_tekken(version: str) -> dict:
    """The content of a tekken.json of a version whose file is not shipped: no released file, but a possible one."""
    content = {**_tekken(), "config": {**_tekken()["config"], "version": version}}
    names = {**NAMED, **(SETTINGS_TOKENS if version == "v15" else {})}
    content["special_tokens"] = [
        {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True} for rank in range(1000)
    ]
    for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS:
        content["special_tokens"][token["rank"]] = {**token, "token_str": str(token["token_str"])}
    if version == "v15":  # no vectors: a part of the vocabulary does, and loads faster
        content |= {"vocab": content["vocab"][:4000], "model_settings_builder": SETTINGS}
        content["config"]["default_vocab_size"] = 5000
    return content


@cache
def oracle(name: str, directory: Path) -> MistralTokenizer:
    """mistral-common's tokenizer of a name of FILES, or "v3_7b", or "tekken-v11" and the like, made in a directory."""
    if name in FILES:
        return MistralTokenizer.from_file(FILES[name])
    if name == "v3_7b":
        path = directory / "tokenizer.model.v3"
        path.write_bytes(RELEASED_7B.read_bytes())
    else:
        path = directory / f"{name}.json"
        path.write_text(json.dumps(newer_tekken(name.removeprefix("tekken-"))))
    return MistralTokenizer.from_file(path)


def encoded(tokenizer: MistralTokenizer, found: list[Segment]) -> list[int]:
    """Segments as ids, by the tokenizer of mistral-common."""
    plain, ids = tokenizer.instruct_tokenizer.tokenizer, []
    for each in found:
        if isinstance(each, Control):
            ids.append(plain.get_special_token(each.name))
        elif isinstance(each, Infill):
            ids += plain.encode("\u263a" + each.text, bos=False, eos=False)[2:]
        else:
            ids += plain.encode(each, bos=False, eos=False)
    return ids


def ours(tokenizer: MistralTokenizer, messages, tools=None, **options) -> list[int] | TemplateError:
    """Our ids of a conversation, or the error."""
    version = tokenizer.version.value
    rules = {"model_settings": SETTINGS} if version == "v15" else {}
    try:
        return encoded(tokenizer, segments(messages, tools, version=version, **rules, **options))
    except TemplateError as error:
        return error


def theirs(tokenizer: MistralTokenizer, messages, tools=None, *, mode="test", **options) -> list[int] | Exception:
    """The ids of mistral-common, or whatever it raises."""
    checked = MistralTokenizer(
        tokenizer.instruct_tokenizer,
        get_validator(tokenizer.version, ValidationMode(mode)),
        tokenizer._instruct_request_normalizer,
    )
    try:
        return checked.encode_chat_completion(ChatCompletionRequest.from_openai(messages, tools, **options)).tokens
    except Exception as error:
        return error


def assert_same(tokenizer: MistralTokenizer, messages, tools=None, **options) -> list[int] | TemplateError:
    """Both give the same ids or both refuse; ours."""
    mine, wanted = ours(tokenizer, messages, tools, **options), theirs(tokenizer, messages, tools, **options)
    assert mine == wanted or (isinstance(mine, Exception) and isinstance(wanted, Exception))
    return mine
