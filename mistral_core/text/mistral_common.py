"""MistralCommonTokenizer: the interface of the tokenizers here over the library mistral-common, id for id its own."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .. import extras
from ..disk import files, into, limits, reading, strict_json
from ..errors import TemplateError, TokenizerError, UnsupportedFeatureError
from ..hub import download
from . import sources
from .chat import messages
from .chat.checks import Problem
from .chat.functions import function_schema
from .inputs import UNBOUNDED, refuse
from .interface import FormattedChat, Tokenizer
from .rows import Columns, Frame

FILES = (sources.TEKKEN, *sources.MODELS)
"""What mistral-common reads, the first that is there."""

SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
)  # fmt: skip
"""Arguments of the constructor, those first that are saved."""

REFUSALS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError)
"""What mistral-common raises beside its own exceptions and pydantic's."""


class MistralCommonTokenizer(Tokenizer):
    """`mistral_common`'s tokenizer of a tekken.json or tokenizer.model, with the methods that transformers documents.

    A pair of texts, offsets and control tokens in a text are not for it: they raise, as documented. What a text says
    never becomes a control token. `mode` is "test", or "finetuning", where a text and a conversation end with `</s>`.
    `decode` without `skip_special_tokens` gives the pieces of a SentencePiece model as they are, spaces as U+2581, as
    mistral-common does. A SentencePiece model has no padding token: rows are padded with 0, which the mask hides.
    Raises TokenizerError (a ValueError), MissingExtraError without mistral-common.
    """

    takes_pairs = False

    def __init__(
        self,
        tokenizer_path: str | os.PathLike[str],
        mode: Literal["test", "finetuning"] = "test",
        model_max_length: int = 10**30,
        padding_side: str = "left",
        truncation_side: str = "right",
        model_input_names: Sequence[str] | None = None,
        clean_up_tokenization_spaces: bool = False,
    ) -> None:
        if clean_up_tokenization_spaces:
            raise UnsupportedFeatureError("clean_up_tokenization_spaces: it would change the text; leave it out.")
        mode = getattr(mode, "value", mode)  # mistral-common's enum
        if mode not in ("test", "finetuning"):
            raise TokenizerError(f"mode must be 'test' or 'finetuning', got {mode!r}.")
        self._path, self.mode = Path(tokenizer_path), mode
        self._data = reading.read(self._path, limit=limits.TEXT_BYTES)
        self.tokenizer = _loaded(self._path, self._data, mode)
        """mistral-common's own."""
        self._inner = self.tokenizer.instruct_tokenizer.tokenizer
        self.model_max_length, self.padding_side, self.truncation_side = model_max_length, padding_side, truncation_side
        if model_input_names is not None:
            self.model_input_names = tuple(model_input_names)
            if "input_ids" not in self.model_input_names:
                raise TokenizerError(f"model_input_names: {model_input_names!r}, without input_ids; add it.")
        self.bos_token, self.eos_token, self.unk_token = "<s>", "</s>", "<unk>"
        self.pad_token = "<pad>" if self._inner.pad_id >= 0 else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        mode: Literal["test", "finetuning"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **settings: Any,
    ) -> MistralCommonTokenizer:
        """Read the tekken.json or the newest tokenizer.model of a directory or a hub id, or one file.

        `settings` are those of the constructor; where they do not say, what `save_pretrained` wrote counts.
        """
        path = reading.held(
            download.resolve(
                pretrained_model_name_or_path,
                files=(*FILES, sources.CONFIG),
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )
        refuse("from_pretrained", {name: value for name, value in settings.items() if name not in SETTINGS}, SETTINGS)
        directory = path if path.is_dir() else path.parent
        saved = {}
        if (directory / sources.CONFIG).exists():
            saved = strict_json.read_object(directory / sources.CONFIG, error=TokenizerError)
        if path.is_dir():
            names = [name for name in FILES if (path / name).exists()]
            if not names:
                raise TokenizerError(f"{path}: no {', '.join(FILES)}; copy that of the checkpoint there.")
            path = path / names[0]
        settings = {name: saved[name] for name in SETTINGS[:3] if name in saved} | settings
        return cls(path, mode or saved.get("mode", "test"), **settings)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> tuple[str, ...]:
        """Write the file under the name that it is found by, and mode, sides and length beside it; return the paths."""

        if push_to_hub:
            raise UnsupportedFeatureError("push_to_hub: call push_to_hub(repo_id) itself, which says where to.")
        directory = Path(save_directory)
        version = "" if self._is_tekken else f".{self._inner.version.value}"
        name = sources.TEKKEN if self._is_tekken else sources.MODEL + version
        config: dict[str, Any] = {
            "tokenizer_class": "MistralCommonTokenizer",
            "mode": self.mode,
            "padding_side": self.padding_side,
        }
        config |= {"truncation_side": self.truncation_side}
        if self.model_max_length < UNBOUNDED:
            config["model_max_length"] = self.model_max_length
        text = (json.dumps(config, indent=2) + "\n").encode()
        into.write_into(directory, {name: self._data, sources.CONFIG: text})
        return str(directory / name), str(directory / sources.CONFIG)

    # What a Tokenizer must know

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._inner.n_words)

    @property
    def frame(self) -> Frame:
        """`<s>` before a text, and `</s>` behind it while finetuning."""
        return Frame([self._inner.bos_id], [self._inner.eos_id] if self.mode == "finetuning" else [], [])

    @cached_property
    def all_special_ids(self) -> frozenset[int]:
        """The ids of control tokens."""
        return frozenset(self._inner.special_ids)

    @property
    def padding_id(self) -> int:
        """The padding token, else 0."""
        return self.pad_token_id or 0

    @property
    def _is_tekken(self) -> bool:
        return hasattr(self._inner, "id_to_byte_piece") and self._path.suffix == ".json"

    def _encode_texts(self, texts: list[str], parse_special: bool) -> list[list[int]]:
        if parse_special:
            raise UnsupportedFeatureError("parse_special: mistral-common never reads control tokens out of a text.")
        return [self._inner.encode(text, bos=False, eos=False) for text in texts]

    def _with_offsets(self, text: str, parse_special: bool) -> Columns:
        raise UnsupportedFeatureError("return_offsets_mapping: mistral-common has none; MistralTokenizer has.")

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        policy = SpecialTokenPolicy.IGNORE if skip_special_tokens else SpecialTokenPolicy.KEEP
        return str(self._inner.decode(ids, special_token_policy=policy))

    def _token(self, token_id: int) -> str:
        return str(self._inner.id_to_piece(token_id))

    def _token_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return super().get_vocab()

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, by id; of ids that read alike, such as halves of characters, the lowest."""
        return dict(self._vocabulary)

    def _chat(
        self,
        conversation: Any,
        tools: Any,
        *,
        said: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **options: Any,
    ) -> FormattedChat:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from pydantic import ValidationError

        refuse("apply_chat_template", options)
        if said:
            raise UnsupportedFeatureError(
                "return_assistant_tokens_mask: not of mistral-common; MistralTokenizer has it."
            )
        if add_generation_prompt and continue_final_message:
            raise TemplateError("add_generation_prompt and continue_final_message contradict each other; pass one.")
        messages.read(conversation)  # refuses images and sounds, which mistral-common would fetch
        try:
            given = [
                function_schema(tool, f"tools[{at}]") if callable(tool) else tool for at, tool in enumerate(tools or ())
            ]
            request: Any = ChatCompletionRequest.from_openai(
                messages=conversation, tools=given or None, continue_final_message=continue_final_message
            )
            ids = list(self.tokenizer.encode_chat_completion(request).tokens)
        except Problem as problem:
            raise TemplateError(f"{problem}.") from problem.__cause__
        except (*REFUSALS, MistralCommonException, ValidationError) as cause:
            raise TemplateError(
                f"conversation: refused by mistral-common ({cause}); correct the messages, or, to train on an answer "
                'at the end, load the tokenizer with mode="finetuning".'
            ) from cause
        return FormattedChat(ids, self._decode(ids, False))


def _loaded(path: Path, data: bytes, mode: str) -> Any:
    """mistral-common's tokenizer of a file, whatever the file is called; it is given a copy of what was read of it."""
    extra = "mistral-common"
    needed = {"what": "MistralCommonTokenizer", "package": extra}
    validator = extras.require("mistral_common.protocol.instruct.validator", extra, **needed)
    tokenizers = extras.require("mistral_common.tokens.tokenizers.mistral", extra, **needed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            files.write_file(copy, data)
            return tokenizers.MistralTokenizer.from_file(str(copy), mode=validator.ValidationMode(mode))
    except ImportError as cause:
        raise extras.missing("a tokenizer.model", "sentencepiece", extra) from cause
    except Exception as cause:  # sentencepiece raises RuntimeError, mistral-common whatever json and pydantic raise
        reason = re.sub(r"\S*" + re.escape(f"/{path.name}"), path.name, str(cause))  # the copy is no name of the user's
        raise TokenizerError(f"{path}: not a tokenizer of mistral-common ({reason}); fetch it again.") from cause
