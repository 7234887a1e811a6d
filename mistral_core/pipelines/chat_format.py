"""How the messages of a conversation become token ids: by the tokenizer's chat template, or as one plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]
"""{"role": ..., "content": ..., ...}, as chat templates take it."""


class ChatFormat(Protocol):
    """How messages become token ids."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that an answer follows."""

    def answered(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to the last character of the last message, an answer: `prompt`'s are their beginning."""

    def context(self, ids: list[int]) -> list[int]:
        """The ids before an answer that decide how its text reads."""


@dataclass(frozen=True)
class TemplateFormat:
    """The tokenizer's chat template; `options` go to `apply_chat_template`."""

    tokenizer: Any
    options: Mapping[str, Any]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that an answer follows; raises TemplateError."""
        return list(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **self.options))

    def answered(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to the last character of the last message, an answer."""
        return list(self.tokenizer.apply_chat_template(list(messages), continue_final_message=True, **self.options))

    def context(self, ids: list[int]) -> list[int]:
        """None: an answer is a text of its own, and begins without SentencePiece's space."""
        return []


@dataclass(frozen=True)
class PlainFormat:
    """No format: the contents of the messages are one text, each piece encoded alone."""

    tokenizer: Any

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that an answer follows."""
        pieces = enumerate(str(message["content"]) for message in messages)
        return [i for at, piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=at == 0)]

    def answered(self, messages: Sequence[Message]) -> list[int]:
        """The ids up to the last character of the last message, an answer."""
        return self.prompt(messages)

    def context(self, ids: list[int]) -> list[int]:
        """The text so far, which the answer goes on with."""
        return ids
