"""MistralTokenizer: text to token ids and back, from the `tokenizer.json` of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import strict_json
from ..errors import TokenizerError, UnsupportedFeatureError
from .encoding import Encoding, as_arrays

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OTHER_FILES = ("tekken.json", *("tokenizer.model" + version for version in ("", ".v1", ".v2", ".v3")))


class MistralTokenizer:
    """A tokenizer.json with the special tokens of its tokenizer_config.json.

    What a user wrote never becomes a control token: `</s>` in a text is encoded as those four characters
    unless `parse_special=True` is passed. `bos_token_id`, `eos_token_id`, `unk_token_id` and `pad_token_id`
    are ids or None. Raises TokenizerError (a ValueError) for a malformed file.
    """

    def __init__(self, text: str, config: dict[str, Any] | None = None, *, where: str = "tokenizer.json"):
        self._json, self._config, self._where = text, dict(config or {}), where
        self._plain = self._build(encode_special=True)
        self.bos_token_id = self._control_id("bos_token", "<s>")
        self.eos_token_id = self._control_id("eos_token", "</s>")
        self.unk_token_id = self._control_id("unk_token", "<unk>")
        self.pad_token_id = self._control_id("pad_token", None)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub_arguments: Any) -> MistralTokenizer:
        """Read tokenizer.json and, if there, tokenizer_config.json from a directory, a file or a hub id.

        `revision`, `cache_dir`, `token` and `local_files_only` go to the hub.
        """
        from ..weights import hub

        root = Path(hub.resolve(path, files=TOKENIZER_FILES, **hub_arguments))
        file = root if root.is_file() else root / "tokenizer.json"
        config_file = file.parent / "tokenizer_config.json"
        others = [name for name in OTHER_FILES if (root / name).exists()]
        if not file.exists() and others:
            raise TokenizerError(f"{root}: {others[0]} is not read yet; put a tokenizer.json beside it.")
        if not file.exists():
            raise TokenizerError(f"{root}: no tokenizer.json; copy the one of the checkpoint there.")
        config = strict_json.read_object(config_file, error=TokenizerError) if config_file.exists() else {}
        try:
            text = file.read_bytes().decode()
        except (UnicodeDecodeError, PermissionError) as cause:
            raise TokenizerError(f"{file}: not UTF-8 text ({cause}); fetch it again.") from cause
        return cls(text, config, where=str(file))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, byte for byte as it was read, and tokenizer_config.json into a directory."""
        from ..weights import files

        config = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
        for name, text in zip(TOKENIZER_FILES, (self._json, config), strict=True):
            files.write_file(Path(directory) / name, text.encode())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._plain.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(
        self, text: str, text_pair: str | None = None, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The ids of a text, or of two as the file joins them; `add_special_tokens` begins each as the file says."""
        for name, value in (("text", text), ("text_pair", text_pair)):
            if name == "text" or value is not None:
                _check_text(name, value)
        tokenizer = self._parsing if parse_special else self._plain
        return list(tokenizer.encode(text, text_pair, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: int | Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of one sequence of ids: a list, an array, or a single id.

        Raises TokenizerError for what is not an integer in [0, vocab_size).
        """
        return self._plain.decode(self._checked(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self,
        rows: Iterable[Iterable[int]],
        *,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """The text of each row of ids: lists, or an array [B, T] of any framework; raises TokenizerError.

        The text is what the ids say: `clean_up_tokenization_spaces` can only be false.
        """
        if clean_up_tokenization_spaces:
            raise UnsupportedFeatureError("clean_up_tokenization_spaces: it would change the text; leave it out.")
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def __call__(
        self, text: str | Sequence[str], text_pair: str | Sequence[str] | None = None, *,
        padding: bool = False, padding_side: str = "left",
        return_tensors: str | None = None, add_special_tokens: bool = True, parse_special: bool = False,
    ) -> Encoding:  # fmt: skip
        """`input_ids` and `attention_mask` of a text or a list of texts: lists, or arrays [B, T] of a framework.

        `return_tensors` is "np", "pt", "jax" or "tf"; a single text is then a batch of one. Padding is masked, so
        any token would do: `pad_token_id`, and where there is none, `eos_token_id`. Raises TokenizerError.
        """
        if padding_side not in ("left", "right"):
            raise TokenizerError(f"padding_side: {padding_side!r}; 'left' or 'right' was expected.")
        texts = [text] if isinstance(text, str) else list(text)
        options = {"add_special_tokens": add_special_tokens, "parse_special": parse_special}
        pairs = [text_pair] * len(texts) if text_pair is None or isinstance(text_pair, str) else list(text_pair)
        if len(pairs) != len(texts):
            raise TokenizerError(f"text_pair: {len(pairs)} texts, {len(texts)} were expected: one beside each text.")
        rows = [self.encode(each, pair, **options) for each, pair in zip(texts, pairs, strict=True)]
        masks = [[1] * len(row) for row in rows]
        if padding:
            longest = max(map(len, rows), default=0)
            rows = [_pad(row, longest, self._padding_id, padding_side) for row in rows]
            masks = [_pad(row, longest, 0, padding_side) for row in masks]
        if return_tensors is not None:
            return as_arrays({"input_ids": rows, "attention_mask": masks}, return_tensors)
        if isinstance(text, str):
            return Encoding(input_ids=rows[0], attention_mask=masks[0])
        return Encoding(input_ids=rows, attention_mask=masks)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Raises UnsupportedFeatureError: a conversation is not turned into ids here."""
        raise UnsupportedFeatureError(
            "apply_chat_template: chat templates are not read; write the instruction format into the text yourself, "
            "control tokens by `encode(text, parse_special=True)`."
        )

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary, or None."""
        return self._plain.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id as it stands in the vocabulary."""
        return str(self._plain.id_to_token(self._checked(token_id)[0]))

    def __repr__(self) -> str:
        return f"MistralTokenizer({self._where!r}, vocab_size={self.vocab_size})"

    @cached_property
    def _parsing(self) -> Tokenizer:
        # A second tokenizer, not a switch on the first: threads may ask for both at once.
        return self._build(encode_special=False)

    @property
    def _padding_id(self) -> int:
        return self.eos_token_id or 0 if self.pad_token_id is None else self.pad_token_id

    def _build(self, *, encode_special: bool) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self._json)
        except Exception as cause:  # tokenizers raises bare Exception
            raise TokenizerError(f"{self._where}: not a tokenizer.json ({cause}); fetch it again.") from cause
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = encode_special
        return tokenizer

    def _control_id(self, key: str, default: str | None) -> int | None:
        token = self._config.get(key, default)
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if token is None:
            return None
        found = self.token_to_id(token) if isinstance(token, str) else None
        if found is None and key in self._config:
            raise TokenizerError(f"{self._where}: {key} {token!r} is no token of it; correct tokenizer_config.json.")
        return found

    def _checked(self, ids: int | Iterable[int]) -> list[int]:
        given: Any = ids.numpy() if hasattr(ids, "numpy") and not hasattr(ids, "tolist") else ids  # TensorFlow
        given = given.tolist() if hasattr(given, "tolist") else given
        sequence, size = [given] if isinstance(given, int) else list(given), self.vocab_size
        for at, each in enumerate(sequence):
            if isinstance(each, bool) or not isinstance(each, (int, np.integer)):
                raise TokenizerError(f"ids[{at}]: {each!r}; an integer was expected: decode row by row.")
            if not 0 <= each < size:
                raise TokenizerError(f"ids[{at}]: {each} is not in [0, {size}); take the tokenizer of the model.")
        return [int(each) for each in sequence]


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"{name}: {type(text).__name__}, a str was expected; decode bytes first.")
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise TokenizerError(
            f"{name}: half a surrogate pair at {cause.start}, which is no character; "
            "read the text with errors='replace'."
        ) from cause


def _pad(row: list[int], length: int, value: int, side: str) -> list[int]:
    fill = [value] * (length - len(row))
    return fill + row if side == "left" else row + fill
