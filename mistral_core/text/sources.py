"""Which of a checkpoint's files its tokenizer is read from, and what they say: chosen by name and content."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .. import strict_json
from ..disk import reading
from ..errors import TokenizerError
from . import bpe, sentencepiece, tekken
from .chat.versions import VERSIONS
from .coder import Coder
from .templates import files as template_files

JSON, CONFIG, TEKKEN, MODEL = "tokenizer.json", "tokenizer_config.json", "tekken.json", "tokenizer.model"
MODELS = (*(f"{MODEL}.{version}" for version in ("v7m1", "v7", "v3", "v2", "v1")), MODEL)
"""SentencePiece's files, by the version that their names end in, the newest first."""

NAMES = (TEKKEN, JSON, *MODELS)
"""Files that hold a vocabulary, the first that is there is read: tekken.json is what its tokenizer.json is made from,
and a tokenizer.json is what users of tokenizer.model expect."""

TEMPLATES = (template_files.FILE, template_files.OLD_FILE)
"""Files of a chat template, which are fetched with those."""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Files = Mapping[str, Callable[[], bytes]]
"""Readers of files, by name."""


class Source(NamedTuple):
    """What a tokenizer is made of."""

    coder: Coder
    tokens: dict[str, str | None]
    """Special tokens by the names of `TOKENS`."""
    config: dict[str, Any]
    """tokenizer_config.json."""
    version: str | None
    """How conversations are written, a key of VERSIONS; None where the files do not tell."""
    file: tuple[str, bytes]
    """What is saved as it was read, by the name that it is found by."""
    templates: dict[str, str]
    """The checkpoint's own chat templates in jinja, by name."""
    settings: dict[str, Any] | None = None
    """What settings of the model a conversation may give."""


def found_in(path: Path) -> Files:
    """The files of a tokenizer at a path: a directory, one file of a vocabulary, or a checkpoint that holds one.

    Raises TokenizerError where there is none.
    """
    from ..weights.formats import base

    path = reading.held(path)
    if path.is_file() and path.suffix != ".gguf":
        beside = path.parent / CONFIG
        files = {CONFIG: base.reader(beside)} if beside.exists() else {}
        files[_name_of(path)] = base.reader(path)
    elif path.is_file() or (path / "assets" / "tokenizer").is_dir() or _is_gguf_alone(path):
        from ..weights.opened import Checkpoint

        files = dict(Checkpoint.open(path).texts)
    else:
        files = {name: base.reader(path / name) for name in (*NAMES, CONFIG) if (path / name).exists()}
    if not any(name in files for name in NAMES):
        raise TokenizerError(f"{path}: no {JSON}, {MODEL} or {TEKKEN}; copy those of the checkpoint there.")
    return files


def _is_gguf_alone(directory: Path) -> bool:
    """Whether the only tokenizer of a directory is within a GGUF file."""
    return not any((directory / name).exists() for name in NAMES) and any(
        name.endswith(".gguf") for name in reading.names(directory)
    )


def _name_of(path: Path) -> str:
    """The usual name of a file of a vocabulary, by its content and the version in its name."""
    head = reading.head(path, 1 << 16)
    if head.lstrip()[:1] == b"{":
        return TEKKEN if b'"token_bytes"' in head else JSON
    version = re.search(r"\.v\d+(m\d+)?$", path.name)
    return next((name for name in MODELS if version and name.endswith(version[0])), MODEL)


def read(path: Path, *, fix_mistral_regex: bool = False) -> Source:
    """The tokenizer at a path, in the first of NAMES that is there; all of it from one moment.

    Raises TokenizerError for what is malformed, TemplateError for a chat template that is.
    """
    return reading.of_one_moment(path, lambda held: _read(held, fix_mistral_regex))


def _read(path: Path, fix_mistral_regex: bool) -> Source:
    files = found_in(path)
    name = next(name for name in NAMES if name in files)
    config: dict[str, Any] = {}
    if CONFIG in files:
        config = strict_json.parse_object(files[CONFIG](), where=f"{path}: {CONFIG}", error=TokenizerError)
    if template_files.FILE in files:  # of a checkpoint in one file
        config["chat_template"] = files[template_files.FILE]().decode(errors="replace")
    directory = path if path.is_dir() else path.parent
    templates = template_files.read(directory, config)
    data, where = files[name](), f"{path}: {name}"
    if name == JSON:
        return _of_json(data, config, where, list(files), templates, fix_mistral_regex)
    version, settings = None, None
    if name == TEKKEN:
        vocabulary = tekken.parse(data, where)
        coder, version, settings = Coder(bpe.of_tekken(vocabulary, where)), vocabulary.version, vocabulary.settings
    else:
        coder = Coder(bpe.of_sentencepiece(sentencepiece.parse(data, where), where), unknown=" \u2047 ")
        version = _version(coder, [name])
    return Source(coder, _tokens(coder, config, where), config, version, (name, data), templates, settings)


def of_text(text: str, config: dict[str, Any], where: str) -> Source:
    """The tokenizer in the text of a tokenizer.json."""
    return _of_json(
        text.encode(), config, where, [], template_files.of_field(config.get("chat_template"), where), False
    )


def _of_json(
    data: bytes, config: dict[str, Any], where: str, names: list[str], templates: dict[str, str], fix_regex: bool
) -> Source:
    from tokenizers import Tokenizer

    wrong = tekken.LLAMA_PATTERN.replace("\\", "\\\\")
    try:
        text = data.decode()
        if fix_regex:
            text = text.replace(wrong, tekken.PATTERN.replace("\\", "\\\\"))
        coder = Coder(Tokenizer.from_str(text))
    except UnicodeDecodeError as cause:
        raise TokenizerError(f"{where}: not UTF-8 text ({cause}); fetch it again.") from cause
    except Exception as cause:  # tokenizers raises bare Exception
        raise TokenizerError(f"{where}: not a tokenizer.json ({cause}); fetch it again.") from cause
    if wrong in text and coder.vocab_size >= 1 << 17 and coder.token_id("[INST]") is not None:
        warnings.warn(
            f"{where}: cuts words by Llama 3's pattern where Tekken has its own: some ids are not those that the model "
            "was trained on; put its tekken.json beside it, or pass fix_mistral_regex=True.",
            stacklevel=5,
        )
    tokens, version = _tokens(coder, config, where), _version(coder, names)
    return Source(coder, tokens, config, version, (JSON, text.encode()), templates)


def _version(coder: Coder, names: list[str]) -> str | None:
    """The instruct version that file names tell, else the control tokens of a vocabulary of SentencePiece's."""
    for name in names:
        version = re.fullmatch(rf"{re.escape(MODEL)}\.(v\d+)(m\d+)?", name)
        if version and version[1] in VERSIONS:
            return version[1]
    if coder.prefix is None:
        return None
    controls = set(coder.special.values())
    return "v7" if "[SYSTEM_PROMPT]" in controls else "v3" if "[INST]" in controls else "v1"


def _tokens(coder: Coder, config: dict[str, Any], where: str) -> dict[str, str | None]:
    """The special tokens that a tokenizer_config.json names, or that Mistral's tokenizers have."""
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokens: dict[str, str | None] = {}
    for key in TOKENS:
        token = config.get(key, usual[key])
        token = token.get("content") if isinstance(token, dict) else token  # a serialized AddedToken
        known = isinstance(token, str) and coder.token_id(token) is not None
        if not known and token is not None and key in config:
            raise TokenizerError(f"{where}: {key} {token!r} is no token of it; correct {CONFIG}.")
        tokens[key] = token if known else None
    return tokens
