"""Conversations as segments: what each instruct version writes, texts apart from control tokens.

Control tokens come from the structure alone: what a message says stays text, whatever it spells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...errors import TemplateError
from ..segments import Control, Infill, Part, Segment, whole
from . import messages as conversations
from .checks import Problem, as_json, as_template_error, from_json, text
from .messages import NO_ID, Call, Message, Mode, Thought
from .model_settings import settings_text
from .tools import definitions
from .turns import only_text, system_prompt, turns
from .versions import Version, version_named

BEGIN, END = Control("<s>"), Control("</s>")


def segments(conversation: Any, tools: Any = None, **options: Any) -> list[Segment]:
    """The segments of `parts`, whose arguments it takes; raises what that raises."""
    return [part.segment for part in parts(conversation, tools, **options)]


def parts(
    conversation: Any,
    tools: Any = None,
    *,
    version: str,
    mode: Mode = "test",
    continue_final_message: bool = False,
    model_settings: Mapping[str, Any] | None = None,
    reasoning_effort: str | None = None,
    response_format: Mapping[str, Any] | None = None,
) -> list[Part]:
    """The prompt of a conversation: messages and tools as OpenAI writes them, `version` as the tokenizer file says.

    What an assistant said are its texts and calls, the end of each answer with them.

    In mode "test" the last turn waits for an answer, or with `continue_final_message` is the beginning of one; in
    mode "finetuning" it is an answer. `model_settings` is the section model_settings_builder of a tekken.json of v15,
    which `reasoning_effort` and `response_format` need. Raises TemplateError (a ValueError) for what the version
    cannot write, with the index of each message that is wrong.
    """
    traits = version_named(version)
    read = conversations.read(conversation, continue_final_message=continue_final_message)
    conversations.check(read, version=traits, mode=mode)
    before_user = [(Control("[AVAILABLE_TOOLS]"), definitions(tools), Control("[/AVAILABLE_TOOLS]"))]
    found = turns(read, version=traits)
    prompt = system_prompt(read, version=traits) if traits.system != "own" else ""
    with as_template_error():
        if traits.settings:
            written = settings_text(model_settings, reasoning_effort=reasoning_effort, response_format=response_format)
            before_user.append((Control("[MODEL_SETTINGS]"), written, Control("[/MODEL_SETTINGS]")))
        elif reasoning_effort is not None or response_format is not None:
            raise Problem(f"reasoning_effort, response_format: {version} has no such settings; leave them out")
        extras = [part for each in before_user if each[1] for part in each]
        return [Part(BEGIN), *_parts(found, traits, extras, prompt)]


def fim_segments(prompt: str, suffix: str | None = None, *, version: str) -> list[Segment]:
    """The prompt that asks for what stands between two texts; raises TemplateError, always for v1."""
    if version_named(version).tools == "none":
        raise TemplateError(f"version: {version} has no tokens to fill in the middle; take a model of v3 or newer.")
    with as_template_error():
        middle = [Infill(text(suffix, "suffix"))] if suffix else []
        written = [part for part in (text(prompt, "prompt"),) if part]
    return [BEGIN, Control("[SUFFIX]"), *middle, Control("[PREFIX]"), *written]


def _parts(found: Sequence[Message], version: Version, extras: Sequence[Segment], prompt: str) -> Iterator[Part]:
    for turn, written in _turns(found, version, extras, prompt):
        said = turn.role == "assistant"
        yield from (whole(each) if said else Part(each) for each in written if each != "")


def _turns(
    found: Sequence[Message], version: Version, extras: Sequence[Segment], prompt: str
) -> Iterator[tuple[Message, Iterable[Segment]]]:
    """Each turn that is written, and how."""
    users = [index for index, turn in enumerate(found) if turn.role == "user"]
    place = {"first": users[0], "last": users[-1]} if users else {}
    for index, turn in enumerate(found):
        if turn.role == "user":
            begun = f"{prompt}\n\n" if prompt and index == place.get(version.system) else ""
            here = extras if index == place.get(version.tools) else ()
            yield turn, _user(begun + only_text(turn.content), version, here)
        elif turn.role == "system":
            yield turn, (Control("[SYSTEM_PROMPT]"), *_chunks(turn.content), Control("[/SYSTEM_PROMPT]"))
        elif version.history or index > place["last"] or not (turn.calls or turn.role == "tool"):
            yield turn, _answer(turn, version) if turn.role == "assistant" else _result(turn, version)


def _user(said: str, version: Version, extras: Sequence[Segment]) -> list[Segment]:
    if version.tools == "none":  # v1 has no such control tokens: its [INST] is text
        return [f"[INST] {said} [/INST]"]
    return [*extras, Control("[INST]"), said, Control("[/INST]")]


def _answer(turn: Message, version: Version) -> Iterator[Segment]:
    if version.tools == "none" or any(isinstance(chunk, Thought) for chunk in turn.content):
        yield from _chunks(turn.content)
    else:
        yield only_text(turn.content).rstrip(" ")
    if turn.calls:
        yield from _calls(turn, version)
    if not turn.continued:
        yield END


def _chunks(content: Sequence[str | Thought]) -> Iterator[Segment]:
    for chunk in content:
        if isinstance(chunk, Thought):
            yield from (Control("[THINK]"), chunk.text)
            if chunk.closed:
                yield Control("[/THINK]")
        else:
            yield chunk


def _calls(turn: Message, version: Version) -> Iterator[Segment]:
    if version.calls in ("list", "list+id"):
        with_id = version.calls == "list+id"
        yield from (Control("[TOOL_CALLS]"), as_json([_call(call, with_id) for call in turn.calls], turn.where))
        return
    for call in turn.calls:
        yield from (Control("[TOOL_CALLS]"), call.name)
        if version.calls == "marks+id" and call.id != NO_ID:
            yield from (Control("[CALL_ID]"), call.id)
        yield from (Control("[ARGS]"), as_json(call.arguments, turn.where))


def _call(call: Call, with_id: bool) -> dict[str, Any]:
    written = {"name": call.name, "arguments": call.arguments}
    return {**written, "id": call.id} if with_id and call.id != NO_ID else written


def _result(turn: Message, version: Version) -> list[Segment]:
    said = only_text(turn.content)
    if version.results == "list":
        parts: list[Segment] = [as_json([{"name": turn.name, "content": from_json(said, turn.where)}], turn.where)]
    elif version.results == "object+id":
        parts = [as_json({"content": from_json(said, turn.where), "call_id": turn.call_id}, turn.where)]
    elif version.results == "marks+id":
        parts = [turn.call_id or "", Control("[TOOL_CONTENT]"), said]
    else:
        parts = [said]
    return [Control("[TOOL_RESULTS]"), *parts, Control("[/TOOL_RESULTS]")]
