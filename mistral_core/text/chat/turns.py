"""Turns: the messages of a conversation as they are written, neighbours of one role joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from .checks import raise_all
from .messages import Content, Message, Thought
from .versions import Version

BETWEEN_MESSAGES = "\n\n"


def joined(contents: Iterable[Content], *, joint: str) -> Content:
    """Contents of messages as one: neighbouring texts become one text, empty ones nothing."""
    chunks: list[list[str] | Thought] = []
    for content in contents:
        between = BETWEEN_MESSAGES
        for chunk in content:
            if isinstance(chunk, Thought):
                chunks.append(chunk)
            elif chunk and chunks and isinstance(chunks[-1], list):
                chunks[-1] += [between, chunk]
                between = joint
            elif chunk:
                chunks.append([chunk])
                between = joint
    return tuple("".join(chunk) if isinstance(chunk, list) else chunk for chunk in chunks)


def only_text(content: Content) -> str:
    """The text of joined content that holds no thinking."""
    return "".join(chunk for chunk in content if isinstance(chunk, str))


def system_prompt(messages: Iterable[Message], *, version: Version) -> str:
    """What all system messages say together."""
    contents = [each.content for each in messages if each.role == "system" and each.content]
    return BETWEEN_MESSAGES.join(only_text(joined([content], joint=version.joint)) for content in contents)


def turns(messages: Sequence[Message], *, version: Version) -> list[Message]:
    """Checked messages as a version writes them; raises one TemplateError for answers that cannot be written."""
    found = [
        turn
        for role, group in groupby(messages, key=lambda each: each.role)
        if role != "system" or version.system == "own"
        for turn in _merged(list(group), version)
    ]
    if version.system != "own" and (not found or found[0].role != "user"):
        found.insert(0, Message(0, "user"))
    if version.pairs == "id":
        found = _results_in_order(found)
    raise_all(_problems(found, version))
    return found


def _merged(group: list[Message], version: Version) -> list[Message]:
    if group[0].role in ("system", "tool"):
        return [replace(each, content=joined([each.content], joint=version.joint)) for each in group]
    return [
        replace(
            group[0],
            content=joined([each.content for each in group], joint=version.joint),
            calls=tuple(call for each in group for call in each.calls),
            continued=group[-1].continued,
        )
    ]


def _results_in_order(found: list[Message]) -> list[Message]:
    """Results of tools in the order of their calls."""
    ordered: list[Message] = []
    place: dict[str | None, int] = {}
    for role, group in groupby(found, key=lambda each: each.role):
        block = list(group)
        if role == "assistant":
            place = {call.id: index for index, call in enumerate(block[-1].calls)}
        ordered += sorted(block, key=lambda each: place.get(each.call_id, 0)) if role == "tool" else block
    return ordered


def _problems(found: Sequence[Message], version: Version) -> Iterator[str]:
    for each in found:
        if each.role == "assistant" and not (each.content or each.calls):
            yield f"{each.where}: an answer without content; write one, or leave the message out"
        if each.content and each.calls and not version.mixed:
            yield f"{each.where}: joined with the answer after it, it has content and calls; this version writes either"
    if version.results == "list":
        yield from _result_problems(found)


def _result_problems(found: Sequence[Message]) -> Iterator[str]:
    """v2 writes one result to an answer; those before the last user message are not written."""
    start = max((index for index, each in enumerate(found) if each.role == "user"), default=0)
    calling, results = False, 0
    for each in found[start:]:
        calling = bool(each.calls) if each.role == "assistant" else calling and each.role == "tool"
        results = results + 1 if calling and each.role == "tool" else 0
        if results > 1:
            yield f"{each.where}: a second result of one answer, which v2 cannot write; call one tool at a time"
