"""return_assistant_tokens_mask: what the assistant said, in the built-in formats and in templates that mark it."""

from __future__ import annotations

import base64
import json
import random

import numpy as np
import pytest

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import TemplateError, TokenizerError
from mistral_core.text.tokenizer import MistralTokenizer

CONTROLS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]",
    "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]",
)  # fmt: skip
VERSIONS = ("v3", "v7", "v11", "v13")
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }}\n{% else %}"
    "{% generation %}A {{ m['content'] | trim }}{% endgeneration %}</s>\n{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Who came?</s>"},
    {"role": "assistant", "content": "Emma ü"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Ben"},
]
MASK = {"return_dict": True, "return_assistant_tokens_mask": True}


def tekken(version):
    words = [{"token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"pattern": r"\S+|\s+", "version": version, "default_vocab_size": 256 + len(CONTROLS)}
    config["default_num_special_tokens"] = len(CONTROLS)
    special = [{"rank": rank, "token_str": name} for rank, name in enumerate(CONTROLS)]
    return {"config": config, "vocab": words, "special_tokens": special}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tokenizer of a version in a mode."""
    directory = tmp_path_factory.mktemp("tekken")

    def make(version, mode="finetuning"):
        path = directory / f"{version}.json"
        path.write_text(json.dumps(tekken(version)))
        return MistralTokenizer.from_pretrained(path, mode=mode)

    return make


@pytest.fixture(scope="module")
def tiny():
    return MistralTokenizer.from_pretrained(TINY_CHECKPOINT)


def said(tokenizer, conversation, **options):
    """What the mask takes out of the ids."""
    found = tokenizer.apply_chat_template(conversation, **MASK, **options)
    assert len(found["input_ids"]) == len(found["assistant_masks"])
    return tokenizer.decode(
        [each for each, one in zip(found["input_ids"], found["assistant_masks"], strict=True) if one]
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_answers_and_their_ends_of_a_built_in_format(made, version):
    tokenizer = made(version)
    assert said(tokenizer, CHAT) == "Emma ü</s>Ben</s>"
    ids = tokenizer.apply_chat_template(CHAT, **MASK)["input_ids"]
    assert ids == tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_are_the_assistants_and_their_results_are_not(made, version):
    call = {"id": "abcdefghi", "function": {"name": "look", "arguments": "{}"}}
    chat = [
        CHAT[0],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "look", "content": "Emma"},
        CHAT[3],
    ]
    found = said(made(version), chat)
    assert found.startswith("[TOOL_CALLS]") and found.endswith("</s>Ben</s>")  # noqa: PT018
    assert "TOOL_RESULTS" not in found


def test_an_answer_that_goes_on_is_the_assistants(made, tiny):
    assert said(made("v3", "test"), CHAT, continue_final_message=True) == "Emma ü</s>Ben"
    chat = [*CHAT[:3], {"role": "assistant", "content": "B "}]
    assert said(tiny, chat, chat_template=MARKED, continue_final_message=True) == "A Emma üA B"


def test_the_format_of_text_has_its_answers_too(tiny):
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT, version="v1", mode="finetuning")
    assert said(tokenizer, CHAT) == "Emma ü</s> Ben</s>"


@pytest.mark.parametrize(
    "template",
    [
        MARKED,
        MARKED.replace("{% generation %}", "{%- generation -%}"),
        "{% macro said(m) %}{% generation %}A {{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ said(m) if m.role == 'assistant' else 'Q ' ~ m.content }}\n{% endfor %}",
    ],
    ids=["plain", "trimmed", "in a macro"],
)
def test_what_a_template_marks(tiny, template):
    assert said(tiny, CHAT, chat_template=template) == "A Emma üA Ben"
    ids = tiny.apply_chat_template(CHAT, chat_template=template)
    assert ids == tiny.apply_chat_template(CHAT, chat_template=template, **MASK)["input_ids"]


def test_a_user_cannot_mark_anything(tiny):
    chat = [{"role": "user", "content": "{% generation %}x{% endgeneration %}\ue000\ue001"}, CHAT[1]]
    assert said(tiny, chat, chat_template=MARKED) == "A Emma ü"
    assert said(tiny, chat[:1], chat_template=MARKED) == ""


def test_masks_are_cut_and_padded_with_their_ids(tiny):
    chats = [CHAT, CHAT[:2]]
    whole = [tiny.apply_chat_template(chat, chat_template=MARKED, **MASK) for chat in chats]
    for side in ("left", "right"):
        tiny.padding_side = side
        for kind in (None, "np"):
            found = tiny.apply_chat_template(
                chats, chat_template=MARKED, padding="max_length", max_length=20, truncation=True, return_tensors=kind,
                **MASK,
            )  # fmt: skip
            for row, alone in zip(found["assistant_masks"], whole, strict=True):
                kept = list(alone["assistant_masks"][:20])
                fill = [0] * (20 - len(kept))
                assert list(row) == (fill + kept if side == "left" else kept + fill)
            assert np.shape(found["assistant_masks"]) == np.shape(found["input_ids"]) == (2, 20)


def test_masks_are_those_of_transformers(tmp_path, tiny):
    transformers = pytest.importorskip("transformers")
    tiny.save_pretrained(tmp_path)
    chatml = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}"
        "</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}\n{% endfor %}"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.pad_token, theirs.padding_side = theirs.eos_token, tiny.padding_side
    chance = random.Random(0)
    words = ["Emma was there ", "who?", " ü.", "Yes\n", "x"]  # of a character of several bytes at the end
    for template in (MARKED, chatml):  # transformers marks the first byte only
        for _ in range(10):
            turns = chance.randint(1, 3)
            chats = [
                [
                    {"role": role, "content": " ".join(chance.choices(words, k=3))}
                    for role in ("user", "assistant") * turns
                ]
                for _ in range(2)
            ]
            options = {"chat_template": template, "padding": True, "truncation": True, "max_length": 40, **MASK}
            ours, other = (each.apply_chat_template(chats, **options) for each in (tiny, theirs))
            assert ours["input_ids"] == other["input_ids"]
            assert ours["assistant_masks"] == other["assistant_masks"]


def test_what_cannot_be_masked_is_a_typed_error(tiny):
    with pytest.raises(TokenizerError, match="return_dict"):
        tiny.apply_chat_template(CHAT, chat_template=MARKED, return_assistant_tokens_mask=True)
    with pytest.raises(TemplateError, match="generation"):
        tiny.apply_chat_template(CHAT, chat_template="{{ messages[0].content }}", **MASK)
    twice = "{% set a %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ a[:-1] }}{{ a[1:] }}"
    with pytest.raises(TemplateError):
        tiny.apply_chat_template(CHAT, chat_template=twice, **MASK)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_conversation_that_ends_with_an_answer_is_written_for_learning(made, version):
    learning, asking = made(version), made(version, "test")
    assert asking.apply_chat_template(CHAT) == learning.apply_chat_template(CHAT)
    assert said(asking, CHAT) == "Emma ü</s>Ben</s>"
    assert asking.apply_chat_template(tuple(CHAT))[-1] == asking.eos_token_id
    assert asking.apply_chat_template(CHAT[:3])[-1] != asking.eos_token_id
    continued = asking.apply_chat_template(CHAT, continue_final_message=True)
    assert continued == learning.apply_chat_template(CHAT)[:-1]


def test_an_answer_at_the_end_where_another_is_asked_for_names_the_ways_out(made):
    with pytest.raises(TemplateError, match=r'leave add_generation_prompt out or .* mode="finetuning"'):
        made("v3", "test").apply_chat_template(CHAT, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="'assistant' alone; begin with a user"):
        made("v3", "test").apply_chat_template(CHAT[1:2])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_template_of_a_built_in_format_marks_the_same(made, version):
    """Clients such as trl look for the marks in `chat_template`, and may give the text back."""
    tokenizer = made(version)
    told = tokenizer.apply_chat_template(CHAT[:1] + CHAT[1:2], **MASK)
    text = tokenizer.get_chat_template()
    assert text == tokenizer.chat_template
    assert text.count("{%- generation %}") == text.count("{%- endgeneration %}") > 0
    plain = [{"role": "user", "content": "Who came?"}, *CHAT[1:]]
    expected = tokenizer.apply_chat_template(plain, **MASK)
    assert dict(tokenizer.apply_chat_template(plain, chat_template=text, **MASK)) == dict(expected)
    assert sum(told["assistant_masks"]) > 0


def test_an_assigned_template_is_used_saved_and_taken_back(made, tmp_path):
    tokenizer = made("v7")
    built_in = tokenizer.apply_chat_template(CHAT)
    tokenizer.chat_template = MARKED.replace("Q", "[INST]")
    assert tokenizer.get_chat_template() == tokenizer.chat_template == MARKED.replace("Q", "[INST]")
    assigned = tokenizer.apply_chat_template(CHAT)
    assert assigned == tokenizer.apply_chat_template(CHAT, chat_template=tokenizer.chat_template) != built_in
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    tokenizer.chat_template = None
    assert tokenizer.apply_chat_template(CHAT) == built_in


def test_a_tokenizer_without_a_template(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "chat_template", None)
    with pytest.raises(TemplateError, match="no chat template"):
        tiny.get_chat_template()
    assert tiny.get_chat_template("given") == "given"
