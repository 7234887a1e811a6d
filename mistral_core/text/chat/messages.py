"""Conversations: messages as dicts in, checked messages out; the rules are those of mistral-common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from ...errors import TemplateError
from .checks import Problem, as_template_error, collect, field, from_json, mapping, raise_all, sequence, text
from .versions import Version

Mode = Literal["test", "finetuning"]
"""What a conversation ends with: a turn to be answered ("test"), or an answer to learn from ("finetuning")."""
MODES = ("test", "finetuning")

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
FOLLOWERS = {
    "system": ("system", "user", "assistant"),
    "user": ("user", "system", "assistant"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("tool", "user", "assistant"),
}
"""Role -> the roles that may come next."""
NO_ID = "null"
"""The id of a call that was given none."""
NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")  # `$` lets a line break at the end pass, and so does mistral-common
NINE = re.compile(r"^[a-zA-Z0-9]{9}$")


class Thought(NamedTuple):
    """A thinking chunk; `closed` where the thinking has ended."""

    text: str
    closed: bool = True


Content = tuple[str | Thought, ...]
"""Chunks; no content and an empty text have none, a list of one empty chunk has one."""


class Call(NamedTuple):
    """A call of a tool; `arguments` is what their JSON says, or the text if it is no JSON."""

    id: str
    name: str
    arguments: Any


@dataclass(frozen=True)
class Message:
    """One message, or several of one role that are written as one; `index` is where it stands."""

    index: int
    role: str
    content: Content = ()
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None
    continued: bool = False

    @property
    def where(self) -> str:
        """How errors call it."""
        return f"messages[{self.index}]"


def read(conversation: Any, *, continue_final_message: bool = False) -> list[Message]:
    """The messages of a conversation as OpenAI writes it: dicts of role, content, tool_calls, tool_call_id and name.

    `reasoning` (or `reasoning_content`) of an assistant is a thinking chunk before its content. Chunks that are
    no text are refused unread. Raises one TemplateError that lists every malformed message.
    """
    with as_template_error():
        given = sequence(conversation, "conversation", "a list of messages")
    messages = collect(partial(_message, index, each) for index, each in enumerate(given))
    if not continue_final_message:
        return messages
    if not messages or messages[-1].role != "assistant":
        raise TemplateError(
            "continue_final_message: the last message is not the assistant's; add the beginning of its answer."
        )
    return [*messages[:-1], replace(messages[-1], continued=True)]


def check(messages: Sequence[Message], *, version: Version, mode: Mode) -> None:
    """Raise one TemplateError that lists everything wrong in the order, or else in the content, of messages."""
    if mode not in MODES:
        raise TemplateError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    raise_all([*_end_problems(messages, mode), *_order_problems(messages), *_pair_problems(messages, version)])
    raise_all(problem for each in messages for problem in _content_problems(each, version))
    last = messages[-1].index if mode == "finetuning" else None
    raise_all(problem for each in messages for problem in _id_problems(each, version, may_lack_ids=each.index == last))


def _message(index: int, given: Any) -> Message:
    where = f"messages[{index}]"
    fields = mapping(given, where)
    role = fields.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Problem(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
    role = ROLES[role]
    if role == "assistant":
        return Message(index, role, _answer(fields, where), _calls(fields.get("tool_calls"), f"{where}.tool_calls"))
    content = _content(field(fields, "content", where), f"{where}.content")
    if role != "tool":
        return Message(index, role, content)
    call_id, name = field(fields, "tool_call_id", where), fields.get("name")
    return Message(
        index,
        role,
        content,
        call_id=None if call_id is None else text(call_id, f"{where}.tool_call_id"),
        name=None if name is None else text(name, f"{where}.name"),
    )


def _answer(fields: Mapping[str, Any], where: str) -> Content:
    """The content of an assistant, its reasoning first."""
    content = fields.get("content")
    chunks = () if content is None else _content(content, f"{where}.content")
    given = [fields[name] for name in ("reasoning", "reasoning_content") if fields.get(name) is not None]
    if not given:
        return chunks
    if given[0] != given[-1]:
        raise Problem(f"{where}: reasoning and reasoning_content differ; keep one")
    if any(isinstance(chunk, Thought) for chunk in chunks):
        raise Problem(f"{where}: reasoning beside a thinking chunk; keep one")
    return (Thought(text(given[0], f"{where}.reasoning")), *chunks)


def _content(value: Any, where: str) -> Content:
    if isinstance(value, str):
        return (text(value, where),) if value else ()
    chunks = sequence(value, where, "a str or a list of chunks")
    return tuple(_chunk(each, f"{where}[{index}]") for index, each in enumerate(chunks))


def _chunk(value: Any, where: str) -> str | Thought:
    fields = mapping(value, where)
    kind = field(fields, "type", where)
    if kind == "text":
        return text(field(fields, "text", where), f"{where}.text")
    if kind != "thinking":
        raise Problem(f"{where}: a chunk of type {kind!r}; only text and thinking are read: leave it out")
    closed = fields.get("closed", True)
    if not isinstance(closed, bool):
        raise Problem(f"{where}.closed must be true or false, got {closed!r}")
    return Thought(text(field(fields, "thinking", where), f"{where}.thinking"), closed)


def _calls(value: Any, where: str) -> tuple[Call, ...]:
    if value is None:
        return ()
    calls = sequence(value, where, "a list of calls")
    return tuple(_call(each, f"{where}[{index}]") for index, each in enumerate(calls))


def _call(value: Any, where: str) -> Call:
    fields = mapping(value, where)
    if fields.get("type", "function") != "function":
        raise Problem(f"{where}.type must be 'function', got {fields['type']!r}")
    function = mapping(field(fields, "function", where), f"{where}.function")
    arguments = field(function, "arguments", f"{where}.function")
    at = f"{where}.function.arguments"
    if arguments is None:
        arguments = ""
    elif isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(dict(arguments))
        except (TypeError, ValueError, RecursionError) as cause:
            raise Problem(f"{at}: cannot be written as JSON ({cause}); pass plain data") from cause
    return Call(
        text(fields.get("id", NO_ID), f"{where}.id"),
        text(field(function, "name", f"{where}.function"), f"{where}.function.name"),
        from_json(text(arguments, at), at),
    )


def _end_problems(messages: Sequence[Message], mode: Mode) -> Iterator[str]:
    if not messages:
        yield "conversation must have at least one message, got none"
        return
    last = messages[-1]
    if mode == "finetuning":
        if last.role != "assistant" or len(messages) == 1:
            yield f"{last.where}: role {last.role!r} at the end; in mode 'finetuning' end with the assistant's answer"
        if last.continued:
            yield "continue_final_message: nothing is continued in mode 'finetuning'; leave it out"
    elif len(messages) == 1 and last.role not in ("user", "system"):
        yield f"{last.where}: role {last.role!r} alone; begin with a user or system message"
    elif last.role == "assistant" and not last.continued:
        yield (
            f"{last.where}: role 'assistant' at the end; end with a user or tool message, pass "
            "continue_final_message=True to have that answer gone on with, or, to train on it, leave "
            'add_generation_prompt out or load the tokenizer with mode="finetuning"'
        )


def _order_problems(messages: Sequence[Message]) -> Iterator[str]:
    for before, each in pairwise(messages):
        if each.role not in FOLLOWERS[before.role]:
            wanted = ", ".join(FOLLOWERS[before.role])
            yield f"{each.where}: role must be one of {wanted}, got {each.role!r} after {before.role!r}: move it"


def _pair_problems(messages: Sequence[Message], version: Version) -> Iterator[str]:
    """Calls and their results; what the first message calls is not counted, and what stays open at the end may."""
    called: list[str] = []
    answered: list[str | None] = []
    for each in messages[1:]:
        if each.role == "tool":
            if version.pairs == "id" and each.call_id not in called:
                yield f"{each.where}: a result of {each.call_id!r}, which nothing before it called; leave it out"
            elif version.pairs == "id" and each.call_id in answered:
                yield f"{each.where}: a second result of {each.call_id!r}; keep one"
            answered.append(each.call_id)
        elif each.role == "assistant":
            if len(called) != len(answered):
                yield f"{each.where}: {len(called)} calls and {len(answered)} results before it; give each call one"
            called, answered = [call.id for call in each.calls], []
            if version.pairs == "id" and len(set(called)) < len(called):
                yield f"{each.where}: two calls of one id; give each its own"


def _content_problems(message: Message, version: Version) -> Iterator[str]:
    if version.calls == "none" and (message.calls or message.role == "tool"):
        yield f"{message.where}: a call or result of a tool, which v1 cannot write; take a newer model"
    if message.role not in version.thinking and any(isinstance(chunk, Thought) for chunk in message.content):
        yield f"{message.where}: a thinking chunk of {message.role!r}, which this version cannot write; leave it out"
    if message.role == "assistant" and not version.mixed and bool(message.content) == bool(message.calls):
        found = "content and tool_calls" if message.calls else "neither content nor tool_calls"
        yield f"{message.where}: {found}; this version writes either: give one of them"
    for name in [call.name for call in message.calls] if message.name is None else [message.name]:
        if not NAME.match(name):
            yield f"{message.where}: the name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, got {name!r}: rename it"


def _id_problems(message: Message, version: Version, *, may_lack_ids: bool) -> Iterator[str]:
    ids: list[str | None] = [message.call_id] if message.role == "tool" else [call.id for call in message.calls]
    for each in ids:
        if version.call_id == "nine" and not (each and NINE.match(each)) and not (may_lack_ids and each == NO_ID):
            yield f"{message.where}: the call id must be nine letters or digits, got {each!r}: rename it"
        if version.call_id == "some" and (not each or each == NO_ID):
            yield f"{message.where}: the call id must be a text other than 'null', got {each!r}: name it"
