"""`mistral chat PATH`: talk with a model in the terminal; a text through a pipe is answered once."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

from ..errors import InputError
from ..pipelines.conversation import Conversation
from ..text.tokenizer import MistralTokenizer
from . import generate, progress, put, repl, stdin


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="a checkpoint directory or a hub id")
    command.add_argument("--system", help="the system prompt")
    command.add_argument(
        "--template",
        default="auto",
        help="auto: as the checkpoint's files say; own: its jinja template; or a built-in version such as v3",
    )
    command.add_argument("--raw", action="store_true", help="no chat format: plain text that the model continues")
    command.add_argument("--forget", action="store_true", help="drop the oldest turns when the context is full")
    generate.model_arguments(command)


def run(options: argparse.Namespace) -> int:
    """Hold a conversation, or answer what comes through a pipe."""
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        if options.json:
            raise InputError('--json: it answers a pipe, as in echo "Hello" | mistral chat PATH --json; leave it out.')
        repl.require()
    text = "" if interactive else stdin.read("text", "answer")
    _, tokenizer, model = generate.load(options)
    raw = options.raw or (options.template == "auto" and not has_chat_format(tokenizer))
    conversation = Conversation(
        model,
        tokenizer,
        plain=raw,
        template=None if options.template == "auto" else options.template,
        forget=options.forget,
        **generate.generation_options(options),
    )
    if raw and not options.raw:
        progress("no chat format in the files of this checkpoint: it continues plain text; --template v1 asks for one")
    if options.system is not None:
        conversation.system = options.system
    return repl.Repl(conversation).run() if interactive else _answer(conversation, text, as_json=options.json)


def has_chat_format(tokenizer: MistralTokenizer) -> bool:
    """Whether the files tell how a chat is written.

    They do by a template, or by the control tokens of v2 and later; the text of v1 is in no file, nor in base models.
    """
    return bool(tokenizer.chat_templates) or tokenizer.version not in (None, "v1")


def _answer(conversation: Conversation, text: str, *, as_json: bool) -> int:
    answer = conversation.say(text, on_text=None if as_json else partial(put, end=""))
    assert conversation.last is not None
    if as_json:
        put(json.dumps({"text": answer, **conversation.last._asdict(), "messages": conversation.messages}))
    else:
        put()
    progress(repl.summary(conversation.last))
    return 0
