"""The tokenizer in the keys of a GGUF file as tokenizer.json, tokenizer_config.json and chat_template.jinja."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ....errors import CorruptCheckpointError
from ....text.beside import MADE
from ....text.bpe import merges_by_score
from ....text.sentencepiece import CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from ...containers.gguf.file import GgufFile
from ...containers.gguf.scan import Strings
from .tokenizer import PATTERNS, PREFIX, TEMPLATE

_LONGEST = 1024  # every place in a token is looked at


def texts(file: GgufFile) -> dict[str, Callable[[], bytes]]:
    """Readers of what a file says, by the names of Hugging Face's files; nothing for a tokenizer that is not known."""
    found: dict[str, Callable[[], bytes]] = {}
    if file.values.get(f"{PREFIX}model") == "llama" or file.values.get(f"{PREFIX}pre") in PATTERNS:
        found["tokenizer.json"] = lambda: _dumped(_tokenizer(file))
        found["tokenizer_config.json"] = lambda: _dumped(_settings(file))
    template = file.values.get(TEMPLATE)
    if isinstance(template, str):
        found["chat_template.jinja"] = template.encode
    return found


def _dumped(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()


class _Tokens(NamedTuple):
    """The arrays of a vocabulary."""

    words: list[str]
    kinds: list[int]
    scores: list[float]

    def special(self) -> list[dict[str, Any]]:
        """What is found in a text before all else."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": each, "content": word, **plain, "special": kind != USER_DEFINED}
            for each, (word, kind) in enumerate(zip(self.words, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def vocab(self) -> dict[str, int]:
        """Token -> id, but for what only fills the rows of the embedding."""
        return {
            word: each
            for each, (word, kind) in enumerate(zip(self.words, self.kinds, strict=True))
            if kind != UNUSED or word != f"[PAD{each}]"
        }


def _tokens(file: GgufFile) -> _Tokens:
    words = file.values.get(f"{PREFIX}tokens")
    if not isinstance(words, Strings):
        raise _bad(file, "tokens", "an array of strings")
    decoded = words.decoded()
    if max(map(len, decoded), default=0) > _LONGEST:
        raise _bad(file, "tokens", f"tokens of at most {_LONGEST} characters")
    kinds = _numbers(file, "token_type", "iu", words.length, NORMAL)
    return _Tokens(decoded, kinds, _numbers(file, "scores", "fiu", words.length, 0.0))  # of Tekken, some write integers


def _numbers(file: GgufFile, name: str, kinds: str, length: int, default: Any) -> list[Any]:
    value = file.values.get(PREFIX + name)
    if value is None:
        return [default] * length
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) != length:
        raise _bad(file, name, f"an array of {length} numbers")
    return value.tolist()


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    """A tokenizer.json, as the library `tokenizers` reads it."""
    tokens = _tokens(file)
    parts = _by_scores(file, tokens) if file.values[f"{PREFIX}model"] == "llama" else _by_merges(file, tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.special(),
        **parts,
        "post_processor": _frame(file, tokens),
    }


def _by_scores(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    prefix = file.values.get(f"{PREFIX}add_space_prefix", True) is True
    scores = {
        word: score
        for word, kind, score in zip(tokens.words, tokens.kinds, tokens.scores, strict=True)
        if kind == NORMAL
    }
    unknown = tokens.words[tokens.kinds.index(UNKNOWN)] if UNKNOWN in tokens.kinds else None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, space] if prefix else [space]
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(tokens, merges_by_score(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _by_merges(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    merges = file.values.get(f"{PREFIX}merges")
    if not isinstance(merges, Strings):
        raise _bad(file, "merges", "an array of strings")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges.decoded())]
    pattern = PATTERNS[str(file.values[f"{PREFIX}pre"])]
    plain = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, {"type": "ByteLevel", **plain}]},
        "decoder": {"type": "ByteLevel", **plain},
        "model": _bpe(tokens, pairs, ignore_merges=True),
    }


def _bpe(tokens: _Tokens, merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return model | settings | {"vocab": tokens.vocab(), "merges": merges}


def _frame(file: GgufFile, tokens: _Tokens) -> dict[str, Any]:
    """Bos before a text and eos behind it, where the file says so."""
    begin = _token(file, tokens, "bos") if file.values.get(f"{PREFIX}add_bos_token", True) is True else None
    end = _token(file, tokens, "eos") if file.values.get(f"{PREFIX}add_eos_token", False) is True else None

    def framed(sequence: str, kind: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        before = [{"SpecialToken": {"id": begin, "type_id": kind}}] if begin is not None else []
        behind = [{"SpecialToken": {"id": end, "type_id": kind}}] if end is not None else []
        return before + steps + behind

    used = [each for each in (begin, end) if each is not None]
    special = {each: {"id": each, "ids": [tokens.words.index(each)], "tokens": [each]} for each in used}
    pair = framed("A", 0) + framed("B", 1)
    return {"type": "TemplateProcessing", "single": framed("A", 0), "pair": pair, "special_tokens": special}


def _token(file: GgufFile, tokens: _Tokens, name: str) -> str | None:
    """The text of a special token; where a file of the kind `llama` names none, it is Llama's."""
    default = {"bos": 1, "eos": 2}.get(name) if file.values[f"{PREFIX}model"] == "llama" else None
    value = file.values.get(f"{PREFIX}{name}_token_id", default)
    return tokens.words[int(value)] if isinstance(value, int | np.integer) and value < len(tokens.words) else None


def _settings(file: GgufFile) -> dict[str, Any]:
    """A tokenizer_config.json."""
    tokens = _tokens(file)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: _token(file, tokens, name) for key, name in names.items()}
    return {
        **MADE,
        **{key: token for key, token in special.items() if token is not None},
        "add_bos_token": file.values.get(f"{PREFIX}add_bos_token", True) is True,
        "add_eos_token": file.values.get(f"{PREFIX}add_eos_token", False) is True,
    }


def _bad(file: GgufFile, name: str, expected: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file.path}: {PREFIX}{name} is not {expected}; convert it again.")
