"""A checkpoint's own chat template, in jinja: what it makes of a conversation.

A template is code of the model's author: it is rendered in a sandbox, in a process of its own, within limits.
What users wrote stays text, whatever the template does with it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...disk import limits
from ...errors import TemplateError, TemplateSecurityError, TemplateTimeoutError
from .. import utf8
from ..segments import Part, Segment
from .marks import Marks, unused_characters
from .said import NOT_ASKED, check_tag, with_spans, without_ends
from .sandbox.process import PROCESS
from .sandbox.worker import MAX_MEMORY, MAX_TEMPLATE_BYTES

MAX_DEPTH = limits.TEMPLATE_DEPTH
"""Of lists and dicts in each other."""
MAX_INTEGER_BITS = limits.TEMPLATE_INTEGER_BITS

Records = Sequence[Mapping[str, Any]]
"""Messages, tools or documents: dicts of plain data (dict, list, str, finite numbers, bool, None)."""


def render(template: str, /, **arguments: Any) -> str:
    """The text of a `RenderedTemplate`; control tokens must not be parsed out of it, users wrote in it too.

    Raises what `RenderedTemplate` and `RenderedTemplate.text` raise.
    """
    return RenderedTemplate(template, **arguments).text()


def segments(template: str, /, *, controls: Collection[str], **arguments: Any) -> list[Segment]:
    """The segments of a `RenderedTemplate`: control tokens where the template wrote them, everything else as text.

    Raises what `RenderedTemplate` and `RenderedTemplate.parts` raise.
    """
    return [part.segment for part in parts(template, controls=controls, **arguments)]


def parts(template: str, /, *, controls: Collection[str], said: bool = False, **arguments: Any) -> list[Part]:
    """The segments of a `RenderedTemplate` and, if asked, where in them lies what it marks as an assistant's.

    Raises what `RenderedTemplate` and `RenderedTemplate.parts` raise.
    """
    return RenderedTemplate(template, **arguments).parts(controls, said=said)


class RenderedTemplate:
    """A conversation and the template that is to write it.

    `continue_final_message` ends the prompt after the content of the last message; `variables` are what the template
    reads by names of its own, such as `enable_thinking`: other names are refused. Raises TemplateError.
    """

    def __init__(
        self,
        template: str,
        /,
        *,
        messages: Records,
        tools: Records | None = None,
        documents: Records | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        bos_token: str = "",
        eos_token: str = "",
        unk_token: str = "",
        pad_token: str = "",
        **variables: Any,
    ) -> None:
        if add_generation_prompt and continue_final_message:
            raise TemplateError("add_generation_prompt and continue_final_message contradict each other; pass one.")
        _check_template(template)
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        self._template, self._names = template, sorted(variables)
        self._given = _plain({**tokens, "add_generation_prompt": bool(add_generation_prompt)}, "tokens")
        self._written = {
            "messages": _records(messages, "messages"),
            "tools": None if tools is None else _records(tools, "tools"),
            "documents": None if documents is None else _records(documents, "documents"),
            **_plain(variables, "variables"),
        }
        if not self._written["messages"]:
            raise TemplateError("messages must be a conversation of at least one, got none.")
        self._unused = unused_characters(template, json.dumps([self._given, self._written], ensure_ascii=False))
        self._end = _put_end(self._written["messages"][-1], self._unused) if continue_final_message else None
        self._now = time.time()

    def text(self) -> str:
        """What the template writes.

        Raises TemplateError, TemplateSecurityError, TemplateTimeoutError, and MissingExtraError without jinja2.
        """
        return self._render(self._written)

    def segments(self, controls: Collection[str]) -> list[Segment]:
        """The segments of `parts`; raises what that raises."""
        return [part.segment for part in self.parts(controls)]

    def parts(self, controls: Collection[str], *, said: bool = False) -> list[Part]:
        """What the template writes, with those of the control tokens in it that are the template's own.

        `said` asks for what stands in its {% generation %} blocks. Raises what `text` raises, and TemplateError where
        the template takes what a user wrote for a control token, or has no such block.
        """
        if said:
            check_tag(self._template)
        plain, marks = self.text(), Marks(tuple(controls), self._unused)
        ends = (next(self._unused), next(self._unused)) if said else NOT_ASKED
        for mark in (marks.everywhere, marks.where_needed):
            marked = self._marked(mark, plain, ends)
            if marked is None:
                continue
            marked, spans = without_ends(marked, ends)
            if marks.removed(marked) == plain:
                return with_spans(marks.split(marked), spans)
        raise TemplateError(
            "chat template: reads control tokens out of a message, and what users write is no control token; "
            "remove them from the messages, or encode the rendered text with parse_special=True if you trust it."
        )

    def _marked(self, mark: Callable[[str], str], plain: str, ends: tuple[str, str]) -> str | None:
        written = _changed(self._written, mark)
        if written == self._written and ends == NOT_ASKED:
            return plain
        try:
            return self._render(written, ends)
        except TemplateTimeoutError:
            raise
        except TemplateError:  # it looks into the messages, and refuses what the marks make of them
            return None

    def _render(self, written: Mapping[str, Any], ends: tuple[str, str] = NOT_ASKED) -> str:
        answer = PROCESS.ask(
            {
                "template": self._template,
                "variables": {**written, **self._given},
                "own": self._names,
                "said": ends,
                "now": self._now,
            }
        )
        if "error" in answer:
            raise _error(answer)
        text: str = answer["text"]
        return text if self._end is None else _cut(text, self._end)


def _check_template(template: str) -> None:
    if not isinstance(template, str):
        raise TemplateError(f"chat template must be a str, got {type(template).__name__}.")
    size = len(_encoded(template, "chat template"))
    if size > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"chat template: {size} bytes, at most {MAX_TEMPLATE_BYTES} are read; shorten it.")


# Plain data


def _records(given: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, (list, tuple)) or not all(isinstance(each, dict) for each in given):
        raise TemplateError(f"{where} must be a list of dicts, got {_shown(given)}.")
    return [_plain(each, f"{where}[{at}]") for at, each in enumerate(given)]


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain data; anything with methods of its own is refused: a template could call them."""
    if isinstance(value, np.generic):  # out of an array or a table
        value = value.item()
    if depth > MAX_DEPTH:
        raise TemplateError(f"{where[:200]} must be a conversation of at most {MAX_DEPTH} levels, got more.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _encoded(value, where)
        return str(value)
    if isinstance(value, int) and value.bit_length() <= MAX_INTEGER_BITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}[{at}]", depth + 1) for at, each in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_plain(key, where): _plain(each, f"{where}[{key!r}]", depth + 1) for key, each in value.items()}
    raise TemplateError(f"{where} must be a dict of strings, list, str, number, bool or None, got {_shown(value)}.")


def _encoded(text: str, where: str) -> bytes:
    if wrong := utf8.problem(text):
        raise TemplateError(f"{where}: {wrong}.")
    return text.encode()


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, (str, int, float)) else type(value).__name__


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every string in it changed, keys too; the names of the variables stay."""

    def walk(each: Any) -> Any:
        if isinstance(each, str):
            return change(each)
        if isinstance(each, list):
            return [walk(item) for item in each]
        if isinstance(each, dict):
            return {change(key): walk(item) for key, item in each.items()}
        return each

    return {name: walk(each) for name, each in value.items()}


# The end of a message that is to be continued


def _put_end(message: dict[str, Any], unused: Iterator[str]) -> str:
    """Put an unused character, and a space, after the content of a message: a template that trims takes the space."""
    content, key, end = message, "content", next(unused)
    if isinstance(message.get("content"), list):
        parts = [each for each in message["content"] if isinstance(each, dict) and isinstance(each.get("text"), str)]
        content, key = parts[-1] if parts else {}, "text"
    if not isinstance(content.get(key), str):
        raise TemplateError("continue_final_message: the last message has no text; give it the one to continue.")
    content[key] += end + " "
    return end


def _cut(text: str, end: str) -> str:
    before, found, after = text.rpartition(end)
    if not found:
        raise TemplateError(
            "continue_final_message: the template does not write the last message; pass add_generation_prompt instead."
        )
    return before if after.startswith(" ") else before.rstrip()


def _error(answer: Mapping[str, Any]) -> TemplateError:
    kind, line = answer["error"], answer.get("line")
    where = f"chat template, line {line}" if line else "chat template"
    message = "".join(each if each.isprintable() else " " for each in answer.get("message", ""))
    if kind == "security":
        return TemplateSecurityError(f"{where}: {message}; refused: take the template of a source you trust.")
    if kind == "words":
        return TemplateError(f"{where}: it refuses, in its own words, {message!r}; change the messages.")
    if kind == "memory":
        return TemplateError(f"{where}: needs more than {MAX_MEMORY >> 20} MB; correct its loops, or send less.")
    return TemplateError(f"{where}: {message}; correct the template, or what it is given.")
