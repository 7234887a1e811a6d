"""Which of a checkpoint's files its tokenizer is read from, and what they say: chosen by name and content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..disk import reading
from ..errors import TokenizerError
from ..telling import warn
from ..weights.formats.base import reader
from ..weights.opening import Checkpoint
from . import beside, bpe, description, sentencepiece, tekken
from .amended import amend, amended, check_ids
from .beside import CONFIG as CONFIG
from .beside import TOKENS as TOKENS
from .beside import Said
from .chat.versions import VERSIONS
from .coder import Coder
from .guarded import load
from .templates import files as template_files

JSON, TEKKEN, MODEL = "tokenizer.json", "tekken.json", "tokenizer.model"
MODELS = (*(f"{MODEL}.{version}" for version in ("v7m1", "v7", "v3", "v2", "v1")), MODEL)
"""SentencePiece's files, by the version that their names end in, the newest first."""

NAMES = (TEKKEN, JSON, *MODELS)
"""Files that hold a vocabulary, the first that is there is read: tekken.json is what its tokenizer.json is made from,
and a tokenizer.json is what users of tokenizer.model expect."""

TEMPLATES = (template_files.FILE, template_files.OLD_FILE, template_files.DIRECTORY)
"""Files and the folder of chat templates, which are fetched with those."""

Files = Mapping[str, Callable[[], bytes]]
"""Readers of files, by name."""


class Source(NamedTuple):
    """What a tokenizer is made of."""

    coder: Coder
    tokens: dict[str, str | None]
    """Special tokens by the names of `TOKENS`."""
    said: Said
    """The files beside the vocabulary."""
    version: str | None
    """How conversations are written, a key of VERSIONS; None where the files do not tell."""
    file: tuple[str, bytes]
    """What is saved as it was read, by the name that it is found by."""
    templates: dict[str, str]
    """The checkpoint's own chat templates in jinja, by name."""
    settings: dict[str, Any] | None = None
    """What settings of the model a conversation may give."""
    as_read: bool = True
    """Whether the file says by itself how texts are encoded."""

    @property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self.said.config


def found_in(path: Path) -> Files:
    """The files of a tokenizer at a path: a directory, one file of a vocabulary, or a checkpoint that holds one.

    Raises TokenizerError where there is none.
    """
    path = reading.held(path)
    if path.is_file() and path.suffix != ".gguf":
        files = _present(path.parent, beside.FILES)
        files[_name_of(path)] = reader(path)
    elif path.is_file() or (path / "assets" / "tokenizer").is_dir() or _is_gguf_alone(path):
        files = dict(Checkpoint.open(path).texts)
    else:
        files = _present(path, (*NAMES, *beside.FILES))
    if not any(name in files for name in NAMES):
        raise TokenizerError(f"{path}: no {JSON}, {MODEL} or {TEKKEN}; copy those of the checkpoint there.")
    return files


def _present(directory: Path, names: Iterable[str]) -> dict[str, Callable[[], bytes]]:
    return {name: reader(directory / name) for name in names if (directory / name).exists()}


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


def read(path: Path, *, fix_mistral_regex: bool | None = None) -> Source:
    """The tokenizer at a path, in the first of NAMES that is there; all of it from one moment.

    Raises TokenizerError for what is malformed, TemplateError for a chat template that is.
    """
    return reading.of_one_moment(path, lambda held: _read(held, fix_mistral_regex))


def _read(path: Path, fix_mistral_regex: bool | None) -> Source:
    files = found_in(path)
    name = next(name for name in NAMES if name in files)
    said = beside.read(files, str(path))
    fields = dict(said.config)
    if template_files.FILE in files:  # of a checkpoint in one file
        fields["chat_template"] = files[template_files.FILE]().decode(errors="replace")
    templates = template_files.read(path if path.is_dir() else path.parent, fields)
    if said.told:
        warn(f"{path}: {CONFIG}: {'; '.join(said.told)}: not done here; see that the model does not need it.")
    data, where = files[name](), f"{path}: {name}"
    if name == JSON:
        fix = bool(said.config.get("fix_mistral_regex")) if fix_mistral_regex is None else fix_mistral_regex
        return _of_json(data, said, where, list(files), templates, fix)
    version, settings = None, None
    if name == TEKKEN:
        vocabulary = tekken.parse(data, where)
        made, marks = amended(bpe.of_tekken(vocabulary, where), said, templates.values(), where)
        coder = Coder(made, marks=marks, where=where)
        version, settings = vocabulary.version, vocabulary.settings
    else:
        made = bpe.of_sentencepiece(sentencepiece.parse(data, where), where)
        made, marks = amended(made, said, templates.values(), where)
        joined = said.config.get("legacy") is False
        coder = Coder(made, unknown=" \u2047 ", marks=marks, joined=joined, where=where)
        version = _version(coder, [name])
    return Source(coder, _tokens(coder, said, where), said, version, (name, data), templates, settings)


def of_text(text: str, config: dict[str, Any], where: str) -> Source:
    """The tokenizer in the text of a tokenizer.json."""
    templates = template_files.of_field(config.get("chat_template"), where)
    return _of_json(text.encode(), beside.of_config(config, where), where, [], templates, False)


def _of_json(
    data: bytes, said: Said, where: str, names: list[str], templates: dict[str, str], fix_regex: bool
) -> Source:
    wrong = tekken.LLAMA_PATTERN.replace("\\", "\\\\").encode()
    if fix_regex:
        data = data.replace(wrong, tekken.PATTERN.replace("\\", "\\\\").encode())
    whole = description.read(data, where)
    factor = description.check(whole, where)
    found = amend(whole, said, templates.values(), where)
    tokenizer = load(json.dumps(whole) if found.tokens or found.space else data.decode(), where)
    check_ids(tokenizer, whole, where)
    coder = Coder(tokenizer, marks=found.marks, factor=factor, size=description.size(whole), where=where)
    if wrong in data and coder.vocab_size >= 1 << 17 and coder.token_id("[INST]") is not None:
        warn(
            f"{where}: cuts words by Llama 3's pattern where Tekken has its own: some ids are not those that the model "
            "was trained on; put its tekken.json beside it, or pass fix_mistral_regex=True."
        )
    tokens, version = _tokens(coder, said, where), _version(coder, names)
    return Source(coder, tokens, said, version, (JSON, data), templates, as_read=not found.space)


def _version(coder: Coder, names: list[str]) -> str | None:
    """The instruct version that file names tell, else the control tokens of a vocabulary of SentencePiece's."""
    for name in names:
        version = re.fullmatch(rf"{re.escape(MODEL)}\.(v\d+)(m\d+)?", name)
        if version and version[1] in VERSIONS:
            return version[1]
    if coder.prefix is None:
        return None
    controls = set(coder.controls.values())
    return "v7" if "[SYSTEM_PROMPT]" in controls else "v3" if "[INST]" in controls else "v1"


def _tokens(coder: Coder, said: Said, where: str) -> dict[str, str | None]:
    """The special tokens that the files beside a vocabulary name, or that Mistral's tokenizers have."""
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokens: dict[str, str | None] = {}
    for key in TOKENS:
        token = said.names.get(key, usual[key])
        known = token is not None and coder.token_id(token) is not None
        if not known and token is not None and key in said.names:
            raise TokenizerError(f"{where}: {key} {token[:80]!a} is no token of it; correct {CONFIG}.")
        tokens[key] = token if known else None
    return tokens
