"""MistralTokenizer: text to token ids and back, from whichever tokenizer file a checkpoint has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..disk import into
from ..errors import TemplateError, TokenizerError
from ..hub import download
from . import beside, sources
from .chat import prompt as chat_prompt
from .chat.tools import without_functions
from .chat.versions import VERSIONS
from .coder import NEVER
from .inputs import refuse
from .interface import FormattedChat, Tokenizer
from .rows import Columns, Frame
from .segments import Part
from .templates import files as template_files
from .templates import prompt as template_prompt
from .templates import saved

SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names")
"""What a tokenizer_config.json says beside special tokens, and what is written into it."""

FRAME = ("add_bos_token", "add_eos_token")

NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "use_fast": (True, None),
    "legacy": (True, False, None),
    "trust_remote_code": (False, None),
    "force_download": (False,),
    "resume_download": (True, False, None),
    "subfolder": ("", None),
    "clean_up_tokenization_spaces": (False, None),
}
"""Arguments of transformers -> the values that change nothing here."""

OWN = "own"
"""As `chat_template`: the checkpoint's."""


class MistralTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, a SentencePiece tokenizer.model (v1, v2, v3, v7) or a tekken.json.

    What a user wrote never becomes a control token: `</s>` in a text is encoded as those four characters unless
    `parse_special=True` is passed. A text is encoded and decoded exactly as the library of the file does it.
    `mode` is "test", where a text is gone on with, or "finetuning", where it ends with `eos_token` and a conversation
    with an answer. In both a conversation that ends with an answer is written for learning, its end with it, unless
    `add_generation_prompt` or `continue_final_message` asks for more.
    Raises TokenizerError (a ValueError) for a malformed file.
    """

    def __init__(
        self,
        source: str | sources.Source,
        config: dict[str, Any] | None = None,
        *,
        where: str = sources.JSON,
        mode: Literal["test", "finetuning"] | None = None,
        sentencepiece_compat: bool = False,
        version: str | None = None,
        fast: bool = False,
    ) -> None:
        if isinstance(source, str):
            source = sources.of_text(source, dict(config or {}), where)
        mode = source.config.get("mode") or "test" if mode is None else mode
        if mode not in ("test", "finetuning"):
            raise TokenizerError(f"mode must be 'test' or 'finetuning', got {mode!r}.")
        if version is not None and version not in VERSIONS:
            raise TokenizerError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}.")
        self._source, self._coder, self._where, self.mode = source, source.coder, where, mode
        self._prefix = "always" if sentencepiece_compat else None
        if fast:
            self._coder.encode_fast()
        self.version = version or source.version
        """How conversations are written, such as "v3"; None where the files do not tell."""
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (
            source.tokens[name] for name in sources.TOKENS
        )
        self.add_bos_token, self.add_eos_token = (beside.flag(source.config, name, where) for name in FRAME)
        """Whether bos_token begins a text and eos_token ends it; None where the vocabulary's file says it."""
        for name in SETTINGS:
            if source.config.get(name) is not None:
                setattr(self, name, beside.setting(name, source.config[name], where))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        mode: Literal["test", "finetuning"] | None = None,
        sentencepiece_compat: bool = False,
        version: str | None = None,
        fast: bool = False,
        fix_mistral_regex: bool | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> MistralTokenizer:
        """Read the tokenizer of a directory, a file, a GGUF or KerasHub checkpoint, or a hub id.

        Of several files tekken.json is read, else tokenizer.json, else tokenizer.model; the path of one reads that.
        `sentencepiece_compat` encodes by a tokenizer.json as SentencePiece does, where it drops a text's first space;
        `version` says how conversations are written, `fix_mistral_regex` puts Tekken's own pattern where a
        tokenizer.json has Llama's. `fast` (with the extra of that name) is for much text: the same ids, two to four
        times as fast, after some seconds in which an encoder is made. `revision`, `cache_dir`, `token` and
        `local_files_only` go to the hub; `settings` are `padding_side`, `truncation_side`, `model_max_length`,
        `pad_token`.
        """
        settings = {name: value for name, value in settings.items() if value not in NO_EFFECT.get(name, ())}
        known = (*SETTINGS, *sources.TOKENS)
        refuse("from_pretrained", {name: value for name, value in settings.items() if name not in known}, known)
        names = (*sources.NAMES, *beside.FILES, *sources.TEMPLATES)
        path = Path(download.resolve(
            pretrained_model_name_or_path, files=names, revision=revision, cache_dir=cache_dir, token=token,
            local_files_only=local_files_only,
        ))  # fmt: skip
        source = sources.read(path, fix_mistral_regex=fix_mistral_regex)
        tokenizer = cls(
            source, where=str(path), mode=mode, sentencepiece_compat=sentencepiece_compat, version=version, fast=fast
        )
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        return tokenizer

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json, a chat template and the file that was read; return the paths.

        transformers loads them and gives the same ids. A tokenizer.json that was read is written byte for byte.
        """
        directory = Path(save_directory)
        name, content = self._source.file
        written = {name: content, **self._templates(), **self._beside()}
        if name != sources.JSON or not self._source.as_read or self._told_frame != self._coder.frame:
            written[sources.JSON] = self._coder.to_json(self._told_frame).encode()
        written[sources.CONFIG] = (json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n").encode()
        into.write_into(directory, written)
        return tuple(str(directory / name) for name in written)

    # What a Tokenizer must know

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._coder.vocab_size

    @property
    def frame(self) -> Frame:
        """The special tokens that the files put around a text; while finetuning, the end of an answer is one."""
        frame, end = self._told_frame, self.eos_token_id
        if self.mode == "test" or frame.after or end is None:
            return frame
        return frame._replace(after=[end])

    @property
    def _told_frame(self) -> Frame:
        """The frame of the vocabulary's file, as `add_bos_token` and `add_eos_token` change it."""
        frame = self._coder.frame
        before = _with(frame.before, self.bos_token_id, self.add_bos_token, "bos_token", at=0)
        after = _with(frame.after, self.eos_token_id, self.add_eos_token, "eos_token", at=len(frame.after))
        same = before == frame.before and after == frame.after
        return frame if same else Frame(before, after, after + before)

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """The ids of control tokens."""
        return frozenset(self._coder.special)

    @property
    def padding_id(self) -> int:
        """The padding token, else the end of an answer, else 0: the attention mask hides it."""
        first = self.pad_token_id if self.pad_token is not None else self.eos_token_id
        return first or 0

    def _encode_texts(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        return self._coder.parsed(texts) if parse_special else self._coder.encode(texts, prefix=self._prefix)

    def _with_offsets(self, text: str, parse_special: bool) -> Columns:
        return self._coder.with_offsets(text, parse_special=parse_special)

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._coder.decode(ids, skip_special_tokens=skip_special_tokens)

    def _token(self, token_id: int) -> str:
        return self._coder.token(token_id)

    def _token_id(self, token: str) -> int | None:
        return self._coder.token_id(token)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, by id."""
        return self._coder.vocabulary()

    # Conversations

    _assigned_template: str | None = None

    @property
    def chat_templates(self) -> dict[str, str]:
        """The checkpoint's own jinja templates, by name; "default" is the one that is used."""
        if self._assigned_template is not None:
            return {template_files.DEFAULT: self._assigned_template}
        return self._source.templates

    @property
    def chat_template(self) -> str | None:
        """The jinja template in use, or one that writes the built-in format and marks answers; None without any.

        An assigned one is used in place of it and of the built-in format; None takes it back.
        """
        own = self.chat_templates
        if self._assigned_template is not None or self.version is None or not _is_of_mistral(own):
            return own.get(template_files.DEFAULT)
        settings = self._source.settings
        return saved.made(self.version, prefix=self._coder.prefix, model_settings=settings, marked=True)

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._assigned_template = template

    def _chat(
        self, conversation: Any, tools: Any, *, said: bool = False, chat_template: str | None = None, **options: Any
    ) -> FormattedChat:
        """By the built-in format of the version, or by a jinja template."""
        if chat_template is None and self._assigned_template is not None:
            chat_template = OWN
        version = self._built_in(chat_template)
        if version is not None:
            parts = self._parts(conversation, tools, version, **options)
        else:
            parts = self._rendered(conversation, tools, chat_template, said=said, **options)
        apart, segments = version is not None, [part.segment for part in parts]
        mask = self._coder.said(parts, apart=apart) if said else None
        return FormattedChat(self._coder.prompt(segments, apart=apart), self._coder.shown(segments, apart=apart), mask)

    def _built_in(self, chat_template: str | None) -> str | None:
        """The version whose built-in format is to be written, or None for a jinja template."""
        if chat_template is not None:
            return chat_template if chat_template in VERSIONS else None
        own = self.chat_templates
        if self.version is not None and _is_of_mistral(own):
            return self.version
        if not own:
            raise TemplateError(
                f"{self._where}: neither a chat template nor a version of Mistral's; pass version= to from_pretrained, "
                f"one of {', '.join(VERSIONS)}, or chat_template=."
            )
        return None

    def _parts(
        self, conversation: Any, tools: Any, version: str, *, add_generation_prompt: bool = False, **options: Any
    ) -> list[Part]:
        known = ("continue_final_message", "reasoning_effort", "response_format")
        refuse("Mistral's format", {name: value for name, value in options.items() if name not in known}, known)
        if add_generation_prompt and options.get("continue_final_message"):
            raise TemplateError("add_generation_prompt and continue_final_message contradict each other; pass one.")
        is_asked = add_generation_prompt or options.get("continue_final_message")
        mode = "finetuning" if not is_asked and _ends_with_an_answer(conversation) else self.mode
        settings = self._source.settings
        return chat_prompt.parts(conversation, tools, version=version, mode=mode, model_settings=settings, **options)

    def _rendered(self, conversation: Any, tools: Any, chat_template: str | None, **options: Any) -> list[Part]:
        tools = without_functions(tools)
        name = None if chat_template in (None, OWN) else chat_template
        if name is None or name in self.chat_templates:
            text = template_files.choose(self.chat_templates, name=name, tools=bool(tools))
        else:
            text = name
        tokens: dict[str, Any] = {name: getattr(self, name) or "" for name in sources.TOKENS}
        controls = list(self._coder.controls.values())
        return template_prompt.parts(text, controls=controls, messages=conversation, tools=tools, **tokens, **options)

    def encode_fim(self, prompt: str, suffix: str | None = None) -> list[int]:
        """The ids that ask for what stands between two texts of code.

        Raises TemplateError for v1, TokenizerError where the vocabulary has no tokens for it.
        """
        return self._coder.prompt(chat_prompt.fim_segments(prompt, suffix, version=self.version or "v1"), apart=True)

    def encode_completion(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt, as `encode` gives them without special tokens, and of a text that goes on after it.

        Where the two as one text have other tokens at the seam, as with a prompt that ends with a blank, the text's own
        are given, without the space that SentencePiece puts before a text.
        """
        whole, first = self._coder.encode([prompt + completion, prompt], prefix=self._prefix)
        if whole[: len(first)] != first:
            return first, self._coder.encode([completion], prefix=NEVER)[0]
        return first, whole[len(first) :]

    # How

    def _templates(self) -> dict[str, bytes]:
        """The files of the chat templates: the checkpoint's own, else one that writes the built-in format.

        None for a tokenizer.json of v1 without one: that of a base model is the same.
        """
        templates = self.chat_templates
        is_base = self.version == "v1" and self._source.file[0] == sources.JSON
        if not templates and self.version is not None and not is_base:
            made = saved.made(self.version, prefix=self._coder.prefix, model_settings=self._source.settings)
            templates = {template_files.DEFAULT: made}
        names = {name: f"{template_files.DIRECTORY}/{name}.jinja" for name in templates}
        names |= {template_files.DEFAULT: template_files.FILE}
        return {names[name]: text.encode() for name, text in templates.items()}

    def _config(self) -> dict[str, Any]:
        """A tokenizer_config.json that says what this tokenizer does."""
        config = {name: value for name, value in self._source.config.items() if name != "chat_template"}
        config = config or dict(beside.MADE)
        config.setdefault("model_input_names", list(self.model_input_names))  # transformers 4 adds a third otherwise
        for name in sources.TOKENS:
            token = getattr(self, name)
            if token != self._source.tokens[name] or (name not in config and token is not None):
                config[name] = token
        changed = [name for name in SETTINGS if getattr(self, name) != getattr(type(self), name)]
        changed += [name for name in FRAME if getattr(self, name) is not None]
        return config | {name: getattr(self, name) for name in changed}

    def _beside(self) -> dict[str, bytes]:
        """The other files that were read beside the vocabulary."""
        kept = dict(self._source.said.files)
        if beside.MAP in kept:
            kept[beside.MAP] = beside.with_names(
                kept[beside.MAP], {name: getattr(self, name) for name in sources.TOKENS}
            )
        return kept

    def __repr__(self) -> str:
        return f"MistralTokenizer({self._where!r}, vocab_size={self.vocab_size}, version={self.version!r})"


def _ends_with_an_answer(conversation: Any) -> bool:
    """Whether the last of several messages is the assistant's, so that there is something to learn."""
    several = isinstance(conversation, list | tuple) and len(conversation) > 1
    return several and isinstance(conversation[-1], Mapping) and conversation[-1].get("role") == "assistant"


def _is_of_mistral(templates: Mapping[str, str]) -> bool:
    """Whether templates, if any, are of Mistral's format: one that knows nothing of [INST] is of another."""
    return not templates or any("[INST]" in text for text in templates.values())


def _with(ids: list[int], token_id: int | None, wanted: bool | None, name: str, *, at: int) -> list[int]:
    """Ids with a token in the first place, or the last one, or without it."""
    there = bool(ids) and (ids[0] if at == 0 else ids[-1]) == token_id
    if wanted is None or wanted == there:
        return ids
    if token_id is None:
        raise TokenizerError(f"add_{name}: true, and there is no {name}; name one.")
    if wanted:
        return [*ids[:at], token_id, *ids[at:]]
    return ids[1:] if at == 0 else ids[:-1]
