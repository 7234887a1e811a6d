"""A tokenizer as keys of GGUF, out of the files that Hugging Face and Mistral give it.

GGUF has two kinds: `llama` merges the two neighbours whose token has the best score, `gpt2` follows a list of merges
over bytes. A BPE with byte fallback is the first, by the rank of the merge that makes a token; Tekken is the second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ....errors import TokenizerError
from ....telling import warn
from ....text import sentencepiece, tekken
from ....text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ...containers.gguf.scan import Value
from ..base import Outline
from .vocabulary import Vocabulary, has_tokenizer, of_tekken

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
PATTERNS = {"tekken": tekken.PATTERN}
"""GGUF's name of a way to cut text into words -> the pattern."""

_MODELS = tuple(f"tokenizer.model{version}" for version in ("", ".v7m1", ".v7", ".v3", ".v2", ".v1"))
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def keys(outline: Outline) -> dict[str, Value | list[str]]:
    """The keys of the outline's tokenizer, and one warning where it has one that llama.cpp cannot use.

    Raises TokenizerError for a malformed file.
    """
    texts = outline.texts
    whole = _json(texts, "tokenizer.json")
    vocabulary = _vocabulary(texts, whole)
    size = outline.config.vocab_size
    problem = "no tokenizer of a kind that it has" if vocabulary is None else _problem(vocabulary, size)
    values: dict[str, Value | list[str]] = dict(_templates(texts))
    if vocabulary is None or problem:
        if has_tokenizer(texts):
            warn(f"gguf: {problem}; llama.cpp will take and give token ids only.")
        return {f"{PREFIX}model": "no_vocab", **values}
    begins, ends = _added(texts, whole)
    padded = [vocabulary.tokens.get(each, (f"[PAD{each}]", UNUSED)) for each in range(size)]
    scores = vocabulary.scores
    values |= {
        f"{PREFIX}model": "gpt2" if scores is None else "llama",
        f"{PREFIX}pre": vocabulary.words or "default",
        f"{PREFIX}tokens": [text for text, _ in padded],
        f"{PREFIX}token_type": np.array([kind for _, kind in padded], np.int32),
        f"{PREFIX}add_bos_token": begins and outline.config.bos_token_id is not None,
        f"{PREFIX}add_eos_token": ends and outline.config.eos_token_id is not None,
        f"{PREFIX}add_space_prefix": vocabulary.space_prefix,
    }
    if scores is None:
        values[f"{PREFIX}merges"] = list(vocabulary.merges)
    else:
        values[f"{PREFIX}scores"] = np.array([scores.get(each, 0.0) for each in range(size)], np.float32)
    unknown = next((each for each, (_, kind) in vocabulary.tokens.items() if kind == UNKNOWN), None)
    return values if unknown is None else {**values, f"{PREFIX}unknown_token_id": np.uint32(unknown)}


def _vocabulary(texts: Mapping[str, bytes], whole: dict[str, Any] | None) -> Vocabulary | None:
    """The first tokenizer that GGUF can hold."""
    name = next((name for name in _MODELS if name in texts), None)
    found = _of_sentencepiece(sentencepiece.parse(texts[name], name)) if name else None
    if found is None and whole is not None:
        found = _of_hugging_face(whole)
    elif found is not None and whole is not None:  # tokens that were added after SentencePiece's own
        found.tokens.update({each: token for each, token in _special(whole).items() if each not in found.tokens})
    if found is None and "tekken.json" in texts:
        found = of_tekken(tekken.parse(texts["tekken.json"]))
    return found


def _problem(vocabulary: Vocabulary, size: int) -> str:
    """Why llama.cpp would refuse a vocabulary."""
    if max(vocabulary.tokens, default=-1) >= size or min(vocabulary.tokens, default=0) < 0:
        return f"the tokenizer has token {max(vocabulary.tokens)}, the config says vocab_size {size}"
    words = [text for text, _ in vocabulary.tokens.values()]
    return "" if len(set(words)) == len(words) and "" not in words else "its tokens are not all different"


def _of_sentencepiece(model: sentencepiece.Model) -> Vocabulary | None:
    if not model.is_bpe:
        return None
    tokens = {
        each: (text.replace("▁", " ") if kind == USER_DEFINED else text, kind)
        for each, (text, _, kind) in enumerate(model.pieces)
    }
    scores = {each: score for each, (_, score, _) in enumerate(model.pieces)}
    return Vocabulary(tokens, scores, space_prefix=model.add_dummy_prefix)


def _of_hugging_face(whole: dict[str, Any]) -> Vocabulary | None:
    """A tokenizer.json whose model is a BPE with byte fallback, or over Tekken's words of bytes."""
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return None
    try:
        ids = {str(text): int(each) for text, each in model["vocab"].items()}
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        merges = [(str(left), str(right)) for left, right in pairs]
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise TokenizerError(f"tokenizer.json: not a BPE model ({cause}); fetch it again.") from cause
    parts = list(_parts(whole.get("normalizer"))) + list(_parts(whole.get("pre_tokenizer")))
    tokens = {each: (text, NORMAL) for text, each in ids.items()} | _special(whole)
    if not model.get("byte_fallback"):
        patterns = [part["pattern"].get("Regex") for part in parts if isinstance(part.get("pattern"), dict)]
        words = next((name for name, pattern in PATTERNS.items() if pattern in patterns), "")
        return Vocabulary(tokens, None, [" ".join(pair) for pair in merges], words) if words else None
    for each, (text, kind) in tokens.items():
        if kind == NORMAL and _BYTE_TOKEN.fullmatch(text):
            tokens[each] = (text, BYTE)
    if model.get("unk_token") in ids:
        tokens[ids[model["unk_token"]]] = (model["unk_token"], UNKNOWN)
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    scores = {each: -float(ranks.get(text, len(merges))) for text, each in ids.items() if tokens[each][1] == NORMAL}
    prefix = any(part.get("type") == "Prepend" or part.get("prepend_scheme", "never") != "never" for part in parts)
    return Vocabulary(tokens, scores, space_prefix=prefix)


def _special(whole: dict[str, Any]) -> dict[int, tuple[str, int]]:
    """The tokens of a tokenizer.json that are found before all others."""
    try:
        return {
            int(token["id"]): (str(token["content"]), CONTROL if token.get("special") else USER_DEFINED)
            for token in whole.get("added_tokens") or ()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise TokenizerError(f"tokenizer.json: added_tokens is malformed ({cause}); fetch it again.") from cause


def _parts(part: Any) -> Iterable[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and those in it."""
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "processors"):
            for inner in part.get(key) or ():
                yield from _parts(inner)


def _added(texts: Mapping[str, bytes], whole: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether a text begins with bos and ends with eos."""
    config = _json(texts, "tokenizer_config.json") or {}
    steps = [step for part in _parts((whole or {}).get("post_processor")) for step in part.get("single") or ()]
    special = [isinstance(step, dict) and "SpecialToken" in step for step in steps] or [True, False]
    begins, ends = config.get("add_bos_token"), config.get("add_eos_token")
    return (
        begins if isinstance(begins, bool) else special[0],
        ends if isinstance(ends, bool) else special[-1] and len(special) > 1,
    )


def _templates(texts: Mapping[str, bytes]) -> Iterable[tuple[str, str]]:
    """The chat template by its key; of several, each by its name too."""
    if "chat_template.jinja" in texts:
        yield TEMPLATE, _decoded(texts, "chat_template.jinja")
        return
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = (_json(texts, name) or {}).get("chat_template")
        if isinstance(found, str):
            yield TEMPLATE, found
            return
        for each in found if isinstance(found, list) else ():
            if isinstance(each, dict) and isinstance(each.get("template"), str) and each.get("name") == "default":
                yield TEMPLATE, each["template"]
                return


def _json(texts: Mapping[str, bytes], name: str) -> dict[str, Any] | None:
    """The object of a file, if it is there; a tokenizer has more characters than `strict_json` has time for."""
    if name not in texts:
        return None
    try:
        data = json.loads(texts[name])
    except (ValueError, RecursionError) as cause:
        raise TokenizerError(f"{name}: not valid JSON ({cause}); fetch it again.") from cause
    if not isinstance(data, dict):
        raise TokenizerError(f"{name}: the top level must be an object, got {type(data).__name__}; fetch it again.")
    return data


def _decoded(texts: Mapping[str, bytes], name: str) -> str:
    try:
        return texts[name].decode()
    except UnicodeDecodeError as cause:
        raise TokenizerError(f"{name}: not UTF-8 ({cause}); save it as UTF-8.") from cause
