"""Conversation: messages, and the cache of what the model has read of them: a turn computes only what is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import EmptyInputError, GenerationConfigError, InputError, MistralError, SequenceTooLongError
from ..generation import GenerationConfig
from ..generation.cache_layout import check_rollback
from ..generation.engine import common_length
from ..outputs import GenerateOutput
from ..text.stream import REPLACEMENT, StoppingStream
from .chat_format import ChatFormat, Message, PlainFormat, TemplateFormat

ANSWER_TOKENS = 1024
"""The most tokens of an answer where nothing else is asked for."""


class Turn(NamedTuple):
    """What an answer took."""

    prompt_tokens: int
    """Tokens of all messages, the last one included."""
    reused: int
    """How many of them were in the cache; the others were computed."""
    new_tokens: int
    seconds: float
    first_token_seconds: float
    """Until the first token of the answer was there."""
    ended: str
    """"end" (of sequence), "stop" (a stop string), "length" (max_new_tokens, the context or max_time), or "stopped"."""
    note: str
    """Why tokens that the cache had seen were computed again, or empty."""
    forgotten: int
    """How many of the oldest messages were dropped to make room."""


class WrittenTurn(NamedTuple):
    """An answer as the model wrote it, in the place of the ids [start, end) that the format has for its text."""

    start: int
    end: int
    ids: list[int]


class TurnIds(NamedTuple):
    """The messages of a turn as ids."""

    messages: list[Message]
    formatted: list[int]
    """As the format has them."""
    written: list[WrittenTurn]
    ids: list[int]
    """As the model reads them: with the answers as it wrote them."""


class Conversation:
    """Messages exchanged with a model: `say` a text and get the answer.

    `messages` may be changed between turns. A turn's prompt is the chat template over all messages, but each answer
    keeps the ids it was generated as: the tokenizer may have others for the same text. What the prompt and the cache
    have in common is kept, and only the rest computed; an answer that was cut is ended by the template like any other.
    The tokenizer's ids stand for an answer that lost some text (at a stop string, inside a character), and for all
    after a message that has changed. A rolling cache that cannot go back so far is computed anew; `last` tells.

    `plain=True` uses no template: what is said and answered is one text. `template` goes to `apply_chat_template`.
    `forget=True` drops the oldest turns when the context is full. `options` are fields of GenerationConfig; an integer
    `seed` is the first answer's, and each further one's is one more. Raises GenerationConfigError.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        messages: Iterable[Message] = (),
        plain: bool = False,
        template: str | None = None,
        forget: bool = False,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer, self.forget = model, tokenizer, forget
        options_of_template = {} if template is None else {"chat_template": template}
        self.format: ChatFormat = PlainFormat(tokenizer) if plain else TemplateFormat(tokenizer, options_of_template)
        self.messages = [dict(message) for message in messages]
        self.last: Turn | None = None
        self.answers = 0
        """How many answers were asked for."""
        self.generation = model.generation_config.replace(
            **options,
            max_new_tokens=ANSWER_TOKENS if max_new_tokens is None else max_new_tokens,
            return_dict_in_generate=True,
        )
        self.generation.check(model.config)
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self.generation, name) != 1:
                raise GenerationConfigError(f"{name}: an answer is one row, written as it comes; leave it 1.")
        self._seen: list[int] = []
        self._cache: Any = None
        self._formatted: list[int] = []
        self._written: list[WrittenTurn] = []
        self._stopping = False

    @property
    def limit(self) -> int:
        """The most tokens of the conversation: `max_position_embeddings`."""
        return int(self.model.config.max_position_embeddings)

    @property
    def system(self) -> str | None:
        """The text of the system prompt, the first message; settable, None removes it."""
        first = self.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if isinstance(self.format, PlainFormat) and text is not None:
            raise InputError("system: a plain text has no system prompt; say it, or choose a chat template.")
        rest = self.messages if self.system is None else self.messages[1:]
        self.messages = rest if text is None else [{"role": "system", "content": text}, *rest]

    def say(self, text: str, *, on_text: Callable[[str], object] | None = None) -> str:
        """The answer to a text; `on_text` is given each piece of it once it is certain: no half character.

        An answer without text leaves `messages` as they were, and so does an error.
        Raises TemplateError, TokenizerError, SequenceTooLongError, and what `generate` raises.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}], on_text)

    def regenerate(self, *, on_text: Callable[[str], object] | None = None) -> str:
        """Another answer in the place of the last one; raises EmptyInputError where there is nothing to answer."""
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise EmptyInputError("regenerate: nothing has been said yet; say something first.")
        return self._answer(messages, on_text)

    def reset(self) -> None:
        """Forget all messages but the system prompt, whose tokens stay in the cache."""
        self.messages = self.messages[: self.system is not None]

    def load(self, messages: Iterable[Mapping[str, Any]]) -> None:
        """Take other messages; raises InputError or TemplateError where no turn could follow: the old ones stay."""
        new = [dict(message) if isinstance(message, Mapping) else {} for message in messages]
        for at, message in enumerate(new):
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise InputError(f"messages[{at}] must be an object with role and content; correct it.")
        self.format.prompt([*new, {"role": "user", "content": "?"}] if not new or new[-1]["role"] != "user" else new)
        self.messages = new

    def stop(self) -> None:
        """End the answer that is being written after its next token: for a signal handler or another thread."""
        self._stopping = True

    def _answer(self, messages: list[Message], on_text: Callable[[str], object] | None) -> str:
        self._stopping = False
        prompt = self._fitting(messages)
        reused, note = self._reusable(prompt.ids)
        generation = self.generation.replace(
            max_new_tokens=min(self.generation.max_new_tokens, self.limit - len(prompt.ids)), seed=self._seed()
        )
        stream = StoppingStream(self.tokenizer, generation.stops, after=self.format.context(prompt.ids))
        answer = Answer(stream, generation, on_text, lambda: self._stopping)
        self.answers += 1
        out = self.model.generate(
            np.array([prompt.ids]),
            past_key_values=self._past(),
            generation_config=generation,
            tokenizer=self.tokenizer,
            streamer=answer,
        )
        seconds = time.perf_counter() - answer.started
        self._seen, self._cache = prompt.ids + answer.ids, out.past_key_values
        self.last = Turn(
            len(prompt.ids), reused, len(answer.ids), seconds, answer.first - answer.started, answer.ended(), note,
            len(messages) - len(prompt.messages),
        )  # fmt: skip
        if answer.text:
            self._remember(prompt, answer)
        return answer.text

    def _fitting(self, messages: list[Message]) -> TurnIds:
        """The prompt, without the oldest turns where it is too long and they may be forgotten."""
        prompt = self._prompt(messages)
        if self.forget and len(prompt.ids) + self.generation.max_new_tokens > self.limit:
            # to the half, so that the next turns need not be computed from their beginning again
            while len(prompt.ids) > self.limit // 2 and (fewer := _without_oldest_turn(prompt.messages)):
                prompt = self._prompt(fewer)
        if len(prompt.ids) >= self.limit:
            raise SequenceTooLongError(
                f"conversation: {len(prompt.ids)} tokens, and the model reads {self.limit}; start over (reset), "
                "say less, or let the oldest turns be forgotten (forget)."
            )
        return prompt

    def _prompt(self, messages: list[Message]) -> TurnIds:
        formatted = self.format.prompt(messages)
        same = common_length(formatted, self._formatted)
        written = [each for each in self._written if each.end <= same]
        ids, at = [], 0
        for each in written:
            ids += formatted[at : each.start] + each.ids
            at = each.end
        return TurnIds(messages, formatted, written, ids + formatted[at:])

    def _remember(self, prompt: TurnIds, answer: Answer) -> None:
        """Take the messages of a turn, and where in them the answer's ids belong."""
        self.messages = [*prompt.messages, {"role": "assistant", "content": answer.text}]
        self._formatted, self._written = prompt.formatted, prompt.written
        try:
            formatted = self.format.answered(self.messages)
        except MistralError:  # a template that cannot tell where an answer ends: it is encoded anew
            return
        start = len(prompt.formatted)
        if formatted[:start] == prompt.formatted:
            self._formatted = formatted
            if answer.is_exact:
                self._written = [*prompt.written, WrittenTurn(start, len(formatted), answer.text_ids)]

    def _past(self) -> GenerateOutput | None:
        if self._cache is None:
            return None
        ids = np.array([self._seen])
        return GenerateOutput(ids, attention_mask=np.ones_like(ids), past_key_values=self._cache)

    def _reusable(self, ids: list[int]) -> tuple[int, str]:
        """How many of the ids `generate` will find in the cache, and why not more."""
        if self._cache is None:
            return 0, ""
        length = int(self._cache.length[0])
        common = min(common_length(ids, self._seen), length, len(ids) - 1)
        slots = [int(keys.shape[1]) for keys in self._cache.keys]
        try:
            check_rollback(self.model.config, slots, [length], [length - common])
        except InputError:
            return 0, f"the cache rolls and cannot go back {length - common} tokens"
        return common, f"{length - common} tokens were taken back" if common < length else ""

    def _seed(self) -> Any:
        seed = self.generation.seed
        return (seed + self.answers) % 2**64 if isinstance(seed, int) else seed


class Answer:
    """An answer as it comes: its ids, and its text without what ends it. A streamer of `generate`."""

    def __init__(
        self,
        stream: StoppingStream,
        generation: GenerationConfig,
        on_text: Callable[[str], object] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._stream, self._ends, self._on_text = stream, generation.eos_token_ids, on_text
        self._is_stopped = is_stopped
        self._reads_prompt = True
        self.ids: list[int] = []
        self.text = ""
        self.is_exact = True
        """Whether the ids say the text, nothing more."""
        self.started = self.first = time.perf_counter()

    @property
    def text_ids(self) -> list[int]:
        """The ids without the one that ends the answer."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self._ends else self.ids

    def put(self, value: Any) -> bool:
        """The prompt [1, T] first, then each token [1]; True ends the answer."""
        if self._reads_prompt:
            self._reads_prompt = False
            return False
        if not self.ids:
            self.first = time.perf_counter()
        self.ids.append(int(value[0]))
        self._tell(self._stream.push(self.ids[-1]))
        return self._is_stopped()

    def end(self) -> None:
        """No more tokens come; what is left of a character that was cut is left out."""
        rest = self._stream.end()
        whole = rest.rstrip(REPLACEMENT)
        self.is_exact = rest == whole and not self._stream.stopped
        self._tell(whole)

    def ended(self) -> str:
        """Why there is no more, as `Turn` has it."""
        if self._stream.stopped:
            return "stop"
        if len(self.text_ids) < len(self.ids):
            return "end"
        return "stopped" if self._is_stopped() else "length"

    def _tell(self, piece: str) -> None:
        self.text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The messages without the first text of the user and what follows it; None where there is only one."""
    users = [at for at, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [message for message in messages[: users[0]] if message["role"] == "system"] + messages[users[1] :]
