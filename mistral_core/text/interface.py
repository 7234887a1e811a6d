"""What every tokenizer here offers: the methods that transformers documents for Mistral's tokenizers."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from ..errors import TemplateError, TokenizerError, UnsupportedFeatureError
from ..weights.push import push_files
from .beside import INPUTS
from .clients import AsTokenizer
from .encoding import Encoding, as_arrays
from .inputs import (
    check_ids,
    check_side,
    check_text,
    choice,
    given,
    integer,
    is_ids,
    limits_of,
    listed,
    plain,
    refuse,
    several,
)
from .rows import NO_FRAME, TRUNCATIONS, Columns, Frame, RowOptions, cut, framed, pad


class FormattedChat(NamedTuple):
    """A conversation as it is given to a model."""

    ids: list[int]
    text: str
    """What the ids say."""
    said: list[int] | None = None
    """1 for each id of what an assistant said, 0 for others, where that was asked for."""


class Tokenizer(AsTokenizer, ABC):
    """Text to token ids and back, one text or many, with the arguments that transformers' users know.

    What a user wrote never becomes a control token unless `parse_special=True` asks for it. Sides are "left" or
    "right". Every method raises TokenizerError, which is a ValueError, for what it cannot take.
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    """Settable; where there is none, rows are padded with `padding_id`, which the attention mask hides."""

    model_input_names: tuple[str, ...] = INPUTS
    takes_pairs = True
    """Whether a second text may stand beside each."""
    padding_side = "left"
    truncation_side = "right"
    model_max_length = 10**30
    """Tokens; what "max_length" means where no `max_length` is given."""

    # What a kind of tokenizer must know

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""

    @property
    @abstractmethod
    def frame(self) -> Frame:
        """The special tokens that `add_special_tokens` puts around a text."""

    @cached_property
    @abstractmethod
    def all_special_ids(self) -> frozenset[int]:
        """The ids of control tokens."""

    @property
    @abstractmethod
    def padding_id(self) -> int:
        """What a row is padded with."""

    @abstractmethod
    def _encode_texts(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        """The ids of each text, nothing added."""

    @abstractmethod
    def _with_offsets(self, text: str, parse_special: bool) -> Columns:
        """`input_ids` of a text and `offset_mapping`: where each begins and ends in it, in characters."""

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids in [0, vocab_size)."""

    @abstractmethod
    def _token(self, token_id: int) -> str:
        """The token of an id in [0, vocab_size)."""

    @abstractmethod
    def _token_id(self, token: str) -> int | None:
        """The id of a token, or None."""

    @abstractmethod
    def _chat(self, conversation: Any, tools: Any, *, said: bool = False, **options: Any) -> FormattedChat:
        """A conversation in ids, with the mask of what an assistant said if asked for."""

    @abstractmethod
    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the tokenizer into a directory, and return the paths."""

    # Sizes and special tokens

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends an answer."""
        return self._special_id("eos_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id of what is no token."""
        return self._special_id("unk_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token, or None; settable."""
        return self._special_id("pad_token")

    @pad_token_id.setter
    def pad_token_id(self, token_id: int | None) -> None:
        self.pad_token = None if token_id is None else self._token(self._checked(token_id)[0])

    @cached_property
    def all_special_tokens(self) -> list[str]:
        """The control tokens, by id."""
        return [self._token(each) for each in sorted(self.all_special_ids)]

    def _special_id(self, name: str) -> int | None:
        token = getattr(self, name)
        if token is None:
            return None
        found = self._token_id(token)
        if found is None:
            raise TokenizerError(f"{name}: {token!r} is no token of this vocabulary; choose one that is.")
        return found

    # Tokens and ids

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, by id; of ids that read alike the lowest."""
        vocabulary: dict[str, int] = {}
        for each in range(self.vocab_size):
            vocabulary.setdefault(self._token(each), each)
        return vocabulary

    def tokenize(self, text: str, **unsupported: Any) -> list[str]:
        """The tokens of a text, nothing added."""
        refuse("tokenize", unsupported)
        return self.convert_ids_to_tokens(self._encode_texts([check_text("text", text)], False)[0])  # type: ignore[return-value]

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """The token of an id, or those of several."""
        checked = self._checked(ids)
        kept = [each for each in checked if not (skip_special_tokens and each in self.all_special_ids)]
        single = integer(ids) is not None
        if single and not kept:
            raise TokenizerError(
                f"ids: {ids} is a special token, which is to be skipped; leave skip_special_tokens out."
            )
        tokens = [self._token(each) for each in kept]
        return tokens[0] if single else tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int] | None:
        """The id of a token, or those of several; what is no token has `unk_token_id`."""
        if isinstance(tokens, str):
            found = self._token_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text that tokens make."""
        return self.decode([self.convert_tokens_to_ids(token) for token in tokens])  # type: ignore[misc]

    def _convert_id_to_token(self, index: int) -> str:
        """The token of an id, as transformers' StopStringCriteria asks for it."""
        return self._token(index)

    def get_special_tokens_mask(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:  # fmt: skip
        """1 for special tokens, 0 for others: of ids as they are, or of the row that special tokens make of them."""
        if already_has_special_tokens:
            return [int(each in self.all_special_ids) for each in self._checked(token_ids_0)]
        row = self.prepare_for_model(token_ids_0, token_ids_1, return_special_tokens_mask=True)
        return list(row["special_tokens_mask"])

    # Text to ids

    def encode(
        self,
        text: str | Sequence[int],
        text_pair: str | None = None,
        *,
        parse_special: bool = False,
        **options: Unpack[RowOptions],
    ) -> Any:
        """The ids of a text: a list, or an array [1, T] of a framework.

        Ids are taken as they are unless `add_special_tokens=True` is said.
        """
        text = plain(text)
        if not isinstance(text, str):
            if not is_ids(text):
                check_text("text", text)
            options.setdefault("add_special_tokens", False)
        return self(text, text_pair, parse_special=parse_special, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[Any],
        text_pair: str | Sequence[str] | None = None,
        text_target: None = None,
        text_pair_target: None = None,
        *,
        parse_special: bool = False,
        return_offsets_mapping: bool = False,
        **options: Unpack[RowOptions],
    ) -> Encoding:
        """`input_ids` and `attention_mask` of a text or several: lists, or arrays [B, T] of a framework.

        A text is a str, or a list of ids, which are framed, cut and padded only; `text_pair` is a second text beside
        each. Of a single text with `return_tensors` it is a batch of one. `return_offsets_mapping` adds
        `offset_mapping`: where in its text each token begins and ends, in characters. `options`: `RowOptions`.
        """
        refuse("a call", given(text_target=text_target, text_pair_target=text_pair_target))
        text, text_pair = plain(text), plain(text_pair)
        single = isinstance(text, str) or is_ids(text)
        texts = [text] if single else several("text", text)
        firsts = self._columns("text", texts, parse_special, return_offsets_mapping)
        seconds = None
        if text_pair is not None:
            pairs = [text_pair] * len(texts) if isinstance(text_pair, str) else several("text_pair", text_pair)
            if len(pairs) != len(texts):
                raise TokenizerError(f"text_pair must be {len(texts)} texts, one beside each text, got {len(pairs)}.")
            seconds = self._columns("text_pair", pairs, parse_special, return_offsets_mapping)
        return self._prepared(firsts, seconds, single, options)

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        *,
        prepend_batch_axis: bool = False,
        **options: Unpack[RowOptions],
    ) -> Encoding:
        """Ids framed by special tokens, cut and padded: lists or arrays [T], [1, T] with `prepend_batch_axis`."""
        first = {"input_ids": self._checked(ids)}
        second = None if pair_ids is None else [{"input_ids": self._checked(pair_ids)}]
        kind = options.pop("return_tensors", None)
        row = self._prepared([first], second, True, options)
        if kind is None:
            return Encoding({key: [value] for key, value in row.items()}) if prepend_batch_axis else row
        batch = as_arrays({key: [value] for key, value in row.items()}, kind)
        return batch if prepend_batch_axis else Encoding({key: value[0] for key, value in batch.items()})

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> Encoding:
        """What calls returned, rows made of one length: a dict of one row or of several, or a list of dicts."""
        limits = limits_of(self, {
            "padding": padding, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of, "truncation": False,
            "padding_side": padding_side, "verbose": verbose,
        })  # fmt: skip
        if not isinstance(encoded_inputs, Mapping):
            names = encoded_inputs[0] if encoded_inputs else {}
            encoded_inputs = {name: [each[name] for each in encoded_inputs] for name in names}
        ids = self.model_input_names[0]
        if ids not in encoded_inputs:
            raise TokenizerError(
                f"encoded_inputs: {', '.join(encoded_inputs) or 'nothing'}, no {ids}; pass what a call returned."
            )
        columns = {name: listed(value) for name, value in encoded_inputs.items()}
        for name in columns.keys() & self.model_input_names:
            columns[name] = [list(row) if isinstance(row, tuple) else row for row in columns[name]]
        single = not columns[ids] or not isinstance(columns[ids][0], list)
        if single:
            columns = {name: [value] for name, value in columns.items()}
        if self._wants_mask(return_attention_mask):
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns[ids]])
        return self._finished(pad(columns, ids, limits, self.padding_id), single, return_tensors)

    def truncate_sequences(
        self,
        ids: Sequence[int],
        pair_ids: None = None,
        *,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], None, list[int]]:
        """(ids that are kept, None, those that are cut and `stride` more)."""
        refuse("truncate_sequences", given(pair_ids=pair_ids))
        strategy = choice("truncation_strategy", truncation_strategy, TRUNCATIONS)
        if strategy in ("only_first", "only_second"):
            raise TokenizerError(f"truncation_strategy: {strategy!r} is for two texts; leave it out.")
        remove = num_tokens_to_remove if strategy else 0
        kept, over = cut(list(ids), remove, check_side("truncation_side", self.truncation_side), stride)
        return kept, None, over

    # Ids to text

    def decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of one sequence of ids: a list, an array of any framework, or a single id.

        The text is what the ids say: `clean_up_tokenization_spaces` can only be false.
        """
        if clean_up_tokenization_spaces:
            raise UnsupportedFeatureError("clean_up_tokenization_spaces: it would change the text; leave it out.")
        return self._decode(self._checked(token_ids), skip_special_tokens)

    def batch_decode(
        self,
        sequences: Iterable[Iterable[int]],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row of ids: lists, or an array [B, T] of any framework."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    # Conversations

    chat_template: str | None = None
    """The jinja template of conversations, where there is one."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The jinja template in use, or the given one; raises TemplateError where there is none."""
        template = self.chat_template if chat_template is None else chat_template
        if template is None:
            raise TemplateError("the tokenizer has no chat template; pass chat_template=, or assign one.")
        return template

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **variables: Any,
    ) -> Any:
        """The ids of a conversation, or of a list of them: [{"role": "user", "content": "Hello"}, ...].

        With `return_dict` an Encoding; without `tokenize` a text to look at, which is not to be encoded again: in it
        control tokens cannot be told from what a user wrote. `continue_final_message` leaves the last answer open;
        without it an answer at the end is written for learning, with its end, unless `add_generation_prompt` asks for
        another.
        `return_assistant_tokens_mask` adds `assistant_masks`: 1 for what the assistant said, which a jinja template
        marks with {% generation %}, and the end of each answer.
        Raises TemplateError, a ValueError, for messages in an order that the model was not made for.
        """
        if not isinstance(truncation, bool):
            raise TokenizerError(f"truncation: {truncation!r}; for a conversation it is True or False.")
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise TokenizerError("return_assistant_tokens_mask: a mask of ids; pass return_dict=True, and tokenize.")
        several = (
            isinstance(conversation, list | tuple) and bool(conversation) and isinstance(conversation[0], list | tuple)
        )
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        options["said"] = return_assistant_tokens_mask
        chats = [
            self._chat(each, tools, **options, **variables) for each in (conversation if several else [conversation])
        ]
        if not tokenize:
            texts = [chat.text for chat in chats]
            return texts if several else texts[0]
        rows: list[Columns] = [
            {"input_ids": chat.ids} | ({} if chat.said is None else {"assistant_masks": chat.said}) for chat in chats
        ]
        encoding = self._prepared(rows, None, not several, {
            "add_special_tokens": False, "padding": padding, "truncation": truncation, "max_length": max_length,
            "return_tensors": return_tensors,
        })  # fmt: skip
        return encoding if return_dict else encoding["input_ids"]

    # Files

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the tokenizer's files in one commit and return its address.

        `private`, `commit_message`, `revision`, `token`, `create_pr` as for models. Raises HubError and its kinds.
        """
        with tempfile.TemporaryDirectory() as folder:
            written = [Path(name) for name in self.save_pretrained(folder)]
            message = options.pop("commit_message", None) or "Upload tokenizer"
            names = {path.relative_to(folder).as_posix(): path for path in written}
            return push_files(names, repo_id, message, **options)

    def add_tokens(self, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedFeatureError: the vocabulary is the model's."""
        raise UnsupportedFeatureError("add_tokens: the vocabulary is the model's; add it to its tokenizer.json.")

    add_special_tokens = add_tokens

    # How

    def _columns(self, name: str, texts: list[Any], parse_special: bool, offsets: bool) -> list[Columns]:
        """The ids of texts, and where their tokens stand."""
        written = [check_text(name, text) for text in texts if not is_ids(text)]
        if offsets and len(written) < len(texts):
            raise TokenizerError(f"return_offsets_mapping: {name} holds ids, which have no place in a text.")
        if offsets:
            return [self._with_offsets(text, parse_special) for text in written]
        encoded = iter(self._encode_texts(written, parse_special))
        return [{"input_ids": self._checked(text) if is_ids(text) else next(encoded)} for text in texts]

    def _prepared(
        self, firsts: list[Columns], seconds: list[Columns] | None, single: bool, options: RowOptions
    ) -> Encoding:
        """Rows framed, cut and padded, with the outputs that were asked for."""
        known = RowOptions.__annotations__
        refuse("this", {name: value for name, value in options.items() if name not in known}, known)
        limits = limits_of(self, options)
        if not self.takes_pairs and (seconds is not None or limits.truncation in ("only_first", "only_second")):
            raise TokenizerError(f"{type(self).__name__} does not take pairs of texts; MistralTokenizer does.")
        frame = self.frame if options.get("add_special_tokens", True) else NO_FRAME
        if options.get("return_special_tokens_mask"):
            for text in (*firsts, *(seconds or ())):
                text["special_tokens_mask"] = [0] * len(text["input_ids"])
        others: Sequence[Columns | None] = [None] * len(firsts) if seconds is None else seconds
        side = check_side("truncation_side", self.truncation_side)
        rows = [framed(first, second, frame, limits, side) for first, second in zip(firsts, others, strict=True)]
        names = list(firsts[0]) if firsts else ["input_ids"]
        if options.get("return_overflowing_tokens"):
            names += ["overflowing_tokens", "num_truncated_tokens"]
        columns = {name: [row[name] for row in rows] for name in names}
        if self._wants_mask(options.get("return_attention_mask")):
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        columns = pad(columns, "input_ids", limits, self.padding_id)
        if options.get("return_length"):
            columns["length"] = [len(row) for row in columns["input_ids"]]
        return self._finished(columns, single, options.get("return_tensors"))

    def _finished(self, columns: Columns, single: bool, return_tensors: str | None) -> Encoding:
        if return_tensors is not None:
            return as_arrays(columns, return_tensors)
        return Encoding({name: rows[0] for name, rows in columns.items()} if single else columns)

    def _wants_mask(self, asked: bool | None) -> bool:
        return "attention_mask" in self.model_input_names if asked is None else asked

    def _checked(self, ids: int | Iterable[int]) -> list[int]:
        return check_ids(ids, self.vocab_size)
