"""The chat templates of Ministral 3, Devstral 2, Magistral and Mistral Small 3, as mistral-common generates them.

The published `chat_template.jinja` of Ministral 3 is the output of this generator with a default system prompt. Each
renders here as transformers renders it.
"""

import copy
import json
import sys
from pathlib import Path

import pytest

from mistral_core.errors import TemplateError
from mistral_core.text.templates.prompt import RenderedTemplate

pytest.importorskip("transformers")
generator = pytest.importorskip("mistral_common.integrations.chat_templates.chat_templates")

from mistral_common.tokens.tokenizers.base import TokenizerVersion  # noqa: E402

DATA = Path(__file__).parents[1] / "data" / "templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
THOUGHT = [{"type": "thinking", "thinking": "Because."}, {"type": "text", "text": "So."}]


def _of(*messages, **variables):
    roles = ("user", "assistant") * len(messages)
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)],
        **variables,
    }


CONVERSATIONS = {
    **json.loads((DATA / "conversations.json").read_text()),
    "a thought": _of("Why?", THOUGHT, "And?"),
    "a thought as transformers says it": {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So.", "reasoning_content": "Because."},
            {"role": "user", "content": "And?"},
        ]
    },
    "a system prompt in chunks": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Think: "}, THOUGHT[0]]},
            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        ]
    },
    "a picture": _of([{"type": "image"}, {"type": "text", "text": "What?"}]),
}
KINDS = {
    "v7": {"tokenizer_version": TokenizerVersion.v7},
    "v11 pictures": {"tokenizer_version": TokenizerVersion.v11, "image_support": True},
    "v11 plain thoughts": {"tokenizer_version": TokenizerVersion.v11, "plain_thinking_support": True},
    "v13 pictures": {"tokenizer_version": TokenizerVersion.v13, "image_support": True},
    "v13 pictures, thoughts, a prompt of its own": {
        "tokenizer_version": TokenizerVersion.v13,
        "image_support": True,
        "thinking_support": True,
        "default_system_prompt": 'Today is {today}.\n"Don\'t" <guess>.',
    },
    "v15 settings": {
        "tokenizer_version": TokenizerVersion.v15,
        "image_support": True,
        "thinking_support": True,
        "reasoning_effort_values": ("none", "high"),
        "reasoning_effort_default": "none",
    },
}


def generated(**kind):
    """The template that mistral-common generates for a kind of tokenizer."""
    plain = dict.fromkeys(
        ("spm", "image_support", "audio_support", "thinking_support", "plain_thinking_support"), False
    )
    none = dict.fromkeys(
        ("default_system_prompt", "model_settings_fields", "reasoning_effort_values", "reasoning_effort_default")
    )
    return generator.generate_chat_template(**{**plain, **none, "use_special_token_variables": True, **kind})


@pytest.fixture(scope="module")
def rendered():
    """transformers' own rendering, as tests/data/templates/make_expected.py asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DATA))
        import make_expected

        yield make_expected.rendered
    sys.modules.pop("make_expected", None)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_templates_render_as_in_transformers(kind, rendered):
    template, texts = generated(**KINDS[kind]), 0
    for name, conversation in CONVERSATIONS.items():
        expected = rendered(template, conversation)
        prompt = RenderedTemplate(template, **copy.deepcopy(conversation), **TOKENS)
        if expected is None:
            with pytest.raises(TemplateError):
                prompt.text()
        else:
            texts += 1
            assert prompt.text() == expected, name
    assert texts > len(CONVERSATIONS) / 2


def test_settings_of_the_model_are_rendered(rendered):
    template = generated(**KINDS["v15 settings"])
    for effort in ("none", "high"):
        conversation = _of("Why?", reasoning_effort=effort)
        text = RenderedTemplate(template, **conversation, **TOKENS).text()
        assert text == rendered(template, conversation)
        assert "[MODEL_SETTINGS]" in text
        assert effort in text
