"""What a line says as token ids and labels: what the model is to learn to say, and IGNORE for all that it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import ExampleChatError, ExampleError, ExampleLabelError, MissingLabelsError, TemplateError
from ..telling import shown
from ..text.tokenizer import MistralTokenizer
from ..validate import IGNORE
from .kinds import KindName


class Example(NamedTuple):
    """One text to learn from."""

    input_ids: Array
    """[T]"""
    labels: Array
    """[T], IGNORE where nothing is learnt; of a classified text its class, []."""
    line: int
    """Its number in the file."""


class Formatter(NamedTuple):
    """How lines are formatted: a tokenizer and, where they have labels, the number of each class."""

    tokenizer: MistralTokenizer
    classes: Mapping[str, int]

    def examples(self, row: Mapping[str, Any], kind: KindName, where: str, line: int) -> tuple[Example, ...]:
        """The example of a line, or the chosen and the rejected one of a preference.

        A first label is IGNORE where a model predicts the next token: nothing stands before it in its text. Raises
        ExampleError and its kinds, which begin with `where`.
        """
        pairs: list[tuple[list[int], Any]]
        if kind == "preference":
            pairs = [self._completion(row, name, where) for name in ("chosen", "rejected")]
        elif kind == "completion":
            pairs = [self._completion(row, "completion", where)]
        elif kind == "chat":
            pairs = [self._chat(row["messages"], row.get("tools"), f"{where}: messages")]
        elif kind == "classification":
            pairs = [self._classified(row, where)]
        elif kind == "tokens":
            pairs = [self._words(row, where)]
        else:
            pairs = [self._text(row["text"], where)]
        made = []
        for ids, labels in pairs:
            arrays = np.array(ids, np.int64), np.array(labels, np.int64)
            if kind not in ("classification", "tokens"):
                arrays[1][:1] = IGNORE
            if not ids or (arrays[1] == IGNORE).all():
                raise MissingLabelsError(
                    f"{where} must hold something to learn, got nothing with a label; take it out."
                )
            made.append(Example(*arrays, line))
        return tuple(made)

    def _text(self, text: Any, where: str) -> tuple[list[int], list[int]]:
        ids = self.tokenizer.encode(_text(text, where, "text"), add_special_tokens=False)
        ids = [*self.tokenizer.frame.before, *ids, self._end] if ids else []
        return ids, ids

    def _chat(self, messages: Any, tools: Any, where: str, answers: int | None = None) -> tuple[list[int], list[int]]:
        """What the assistant says is learnt, or the last so many answers of it."""
        _check_messages(messages, where)
        if messages[-1]["role"] != "assistant":
            role = shown(messages[-1]["role"])
            raise ExampleChatError(f"{where} must end with the assistant's answer, got role {role} at the end; add it.")
        try:
            found = self.tokenizer.apply_chat_template(
                messages, tools, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as cause:
            raise ExampleChatError(f"{where.removesuffix(': messages')}: {cause}") from cause
        ids, mask = found["input_ids"], found["assistant_masks"]
        if answers is not None:
            mask = _last_runs(mask, answers)
        return ids, [each if said else IGNORE for each, said in zip(ids, mask, strict=True)]

    def _completion(self, row: Mapping[str, Any], name: str, where: str) -> tuple[list[int], list[int]]:
        """The field's text after its prompt, or its messages after those of the prompt."""
        prompt, completion = row["prompt"], row[name]
        if isinstance(prompt, str) and isinstance(completion, str):
            if row.get("tools"):
                raise ExampleError(f"{where}: tools must be beside messages, got them beside texts; leave them out.")
            before, after = self.tokenizer.encode_completion(
                _text(prompt, where, "prompt"), _text(completion, where, name)
            )
            before = [*self.tokenizer.frame.before, *before]
            after = [*after, self._end] if after else []
            return before + after, [IGNORE] * len(before) + after
        if not (isinstance(prompt, list) and isinstance(completion, list)):
            raise ExampleError(
                f"{where}: prompt and {name} must both be texts or both lists of messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__}."
            )
        _check_messages(prompt, f"{where}: prompt")
        _check_messages(completion, f"{where}: {name}")
        if prompt[-1]["role"] == "assistant" or completion[0]["role"] != "assistant":
            raise ExampleChatError(
                f"{where}: prompt must end with what is answered and {name} begin with the assistant's answer, got "
                f"{prompt[-1]['role']!a} and {completion[0]['role']!a}; move the messages."
            )
        answers = sum(role == "assistant" for role, _ in groupby(completion, key=lambda each: each["role"]))
        return self._chat([*prompt, *completion], row.get("tools"), f"{where}: prompt and {name}", answers)

    def _classified(self, row: Mapping[str, Any], where: str) -> tuple[list[int], int]:
        return self.tokenizer.encode(_text(row["text"], where, "text")), self._class(row["label"], f"{where}: label")

    def _words(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
        """Words as one text with a blank between them; the first token of each has its label, the others IGNORE.

        A token of a blank alone is the next word's, as the pipeline's strategy "first" has it.
        """
        words, labels = row["tokens"], row["labels"]
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels):
            raise ExampleError(
                f"{where}: tokens and labels must be lists of one length, got {shown(words)}, {shown(labels)}."
            )
        classes = [
            IGNORE if each in (None, IGNORE) else self._class(each, f"{where}: labels[{at}]")
            for at, each in enumerate(labels)
        ]
        for at, word in enumerate(words):
            if not _text(word, where, f"tokens[{at}]") or any(map(str.isspace, word)):
                raise ExampleError(f"{where}: tokens[{at}] must be a word without blanks, got {shown(word)}; split it.")
        found = self.tokenizer(" ".join(words), return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        word_at = [at for at, word in enumerate(words) for _ in range(len(word) + (at > 0))]  # of each character
        row_labels, seen = [IGNORE] * len(ids), {IGNORE}
        for column, (begin, end) in enumerate(offsets):
            at = word_at[end - 1] if end > begin else IGNORE
            if at not in seen:
                seen.add(at)
                row_labels[column] = classes[at]
        if lost := [words[at] for at in range(len(words)) if at not in seen]:
            raise ExampleError(f"{where}: tokens must be words of a token at least, got {shown(lost)}; leave them out.")
        return ids, row_labels

    def _class(self, label: Any, where: str) -> int:
        """The number of a class that is given by it or by its name."""
        if isinstance(label, str) and label in self.classes:
            return self.classes[label]
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.classes):
            return label
        raise ExampleLabelError(
            f"{where} must be a number from 0 to {len(self.classes) - 1}, or one of {shown(list(self.classes))}, got "
            f"{shown(label)}; correct it, or give all classes."
        )

    @property
    def _end(self) -> int:
        end = self.tokenizer.eos_token_id
        assert end is not None, "Examples has asked for it"
        return end


def _check_messages(messages: Any, where: str) -> None:
    """Refuse what is no list of messages, and what would be learnt otherwise than it says."""
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise ExampleChatError(f"{where} must be a list of messages of role and content, got {shown(messages)}.")
    for at, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ExampleChatError(f"{where}[{at}].role must be a text, got {shown(message.get('role'))}.")
        if message.get("weight") not in (None, 1):
            raise ExampleChatError(
                f"{where}[{at}].weight must be 1, got {shown(message['weight'])}: every answer is learnt; give the "
                "messages before the last answer as prompt and that one as completion, or leave the line out."
            )


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise ExampleError(f"{where}: {name} must be a text, got {shown(value)}.")
    return value


def _last_runs(mask: Sequence[int], count: int) -> list[int]:
    """A mask of which only the last runs of ones are left."""
    runs = [(one, len(list(group))) for one, group in groupby(mask)]
    ones = [at for at, (one, _) in enumerate(runs) if one][-count:]
    return [int(at in ones) for at, (_, size) in enumerate(runs) for _ in range(size)]
