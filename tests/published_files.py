"""The tokenizer.json files that Mistral 7B has on the hub, rebuilt byte for byte from the files of mistral-common."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import mistral_common

from mistral_core.text.bpe import merges_by_score
from mistral_core.text.sentencepiece import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, parse

DATA = Path(mistral_common.__file__).parent / "data"
V1, V3 = DATA / "tokenizer.model.v1", DATA / "mistral_instruct_tokenizer_240216.model.v2"

# name -> (model, whether it is of 2023, SHA-256 as public manifests have it)
PUBLISHED = {
    "v0.1-2023": (V1, True, "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"),
    "v0.1-current": (V1, False, "11c08db21487c885d8c792180f0be237f6a261b89a46f128a6a80a3aa4bd1720"),
    "v0.3": (V3, False, "e553af6fff7d7ad76e830608b218c5c0b0822998d5a1a96099a74cd3c1cb1a49"),
}

SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
OF_2023 = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}
CURRENT = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


def begin(kind):
    return {"SpecialToken": {"id": "<s>", "type_id": kind}}


def sequence(name, kind):
    return {"Sequence": {"id": name, "type_id": kind}}


@cache
def published(name: str) -> bytes:
    """The content of one of PUBLISHED."""
    path, of_2023, digest = PUBLISHED[name]
    pieces = parse(path.read_bytes(), str(path)).pieces
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True}
    if not of_2023:
        model["ignore_merges"] = False
    model["vocab"] = {text: number for number, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    model["merges"] = [" ".join(pair) for pair in merges_by_score(scores)]
    special = [(each, text) for each, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    document = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": each, "content": text, **plain} for each, text in special],
        "normalizer": OF_2023 if of_2023 else None,
        "pre_tokenizer": None if of_2023 else CURRENT,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin(0), sequence("A", 0)],
            "pair": [begin(0), sequence("A", 0), begin(1), sequence("B", 1)],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": DECODERS},
        "model": model,
    }  # fmt: skip
    content = json.dumps(document, indent=2, ensure_ascii=False).encode()
    assert hashlib.sha256(content).hexdigest() == digest, name
    return content
