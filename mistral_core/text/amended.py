"""A tokenizer.json as the files beside it change it: tokens added and made special, no space before a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TokenizerError
from ..telling import warn
from .beside import Said
from .guarded import load

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BRACKETS = re.compile(r"\s*[<\[{|].*[>\]}|]\s*", re.DOTALL)
"""What marks of a conversation look like: `<|im_start|>`, `[/INST]`."""

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


_SPACED = ("pre_tokenizer", "normalizer", "decoder")
"""The parts that put a space before a text, and take it away again."""


class Amended(NamedTuple):
    """What became of a tokenizer.json."""

    tokens: bool
    """Whether added tokens changed."""
    space: bool
    """Whether it puts a space elsewhere than before."""
    marks: frozenset[str]
    """Tokens of a chat template that are not called special: special here, so that no text becomes one."""


def amend(whole: dict[str, Any], said: Said, templates: Iterable[str], where: str) -> Amended:
    """Change the object of a tokenizer.json, which is checked, to what is said of it.

    Raises TokenizerError where what is said contradicts the file.
    """
    entries = whole["added_tokens"]
    before = [dict(each) for each in entries]
    by_name = {each.get("content"): each for each in entries}
    vocabulary = whole["model"].get("vocab")
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    _add(entries, by_name, vocabulary, said, where)
    _name(entries, by_name, vocabulary, said, where)
    marks = _marks(by_name, templates, said.config.get("chat_control_tokens"))
    for name in marks:
        by_name[name]["special"] = True
    space = said.config.get("add_prefix_space")
    spaced = isinstance(space, bool) and _set_space(whole, space)
    return Amended(entries != before, spaced, marks)


def amended(tokenizer: Tokenizer, said: Said, templates: Iterable[str], where: str) -> tuple[Tokenizer, frozenset[str]]:
    """A tokenizer that was not made of a tokenizer.json, with what is said beside its file, and its marks."""
    entries = [
        {"id": each, "content": token.content, **{name: getattr(token, name) for name in _FLAGS}}
        for each, token in tokenizer.get_added_tokens_decoder().items()
    ]
    outline: dict[str, Any] = {
        "added_tokens": entries,
        "model": {"vocab": tokenizer.get_vocab(with_added_tokens=False)},
    }
    found = amend(outline, said, templates, where)
    if found.tokens or isinstance(said.config.get("add_prefix_space"), bool):
        whole: dict[str, Any] = json.loads(tokenizer.to_str())
        amend(whole, said, templates, where)
        tokenizer = load(json.dumps(whole), where)
        check_ids(tokenizer, whole, where)
    return tokenizer, found.marks


def check_ids(tokenizer: Tokenizer, whole: Mapping[str, Any], where: str) -> None:
    """Raise TokenizerError where added tokens have other ids than is said: the library gives them in a row."""
    for entry in whole["added_tokens"]:
        name, wanted = str(entry.get("content", "")), entry.get("id")
        found = tokenizer.token_to_id(name)
        if found is not None and found != wanted:
            raise TokenizerError(
                f"{where}: the added token {name[:80]!a} with the id {wanted}, which would be {found}; "
                "correct the ids of added tokens: they follow those of the vocabulary without a gap."
            )


def _add(entries: list[Any], by_name: dict[Any, Any], vocabulary: Mapping[str, int], said: Said, where: str) -> None:
    """Add the tokens of an added_tokens_decoder or added_tokens.json that are not there; tell where they contradict."""
    names = {number: name for name, number in vocabulary.items()} | {each.get("id"): each for each in entries}
    others = []
    for number, entry in sorted(said.added.items()):
        name, there = entry["content"], names.get(number)
        there = there.get("content") if isinstance(there, dict) else there
        known = by_name[name].get("id") if name in by_name else vocabulary.get(name)
        if there not in (None, name) or known not in (None, number):
            others.append(f"{number} {name[:40]!a}")
        elif name in by_name:
            by_name[name].update(entry, special=entry["special"] or by_name[name].get("special", False))
        else:
            entries.append(dict(entry))
            by_name[name] = entries[-1]
    if others:
        warn(f"{where}: has other tokens than the files beside it say, {', '.join(others[:8])}; its own are taken.")


def _name(entries: list[Any], by_name: dict[Any, Any], vocabulary: Mapping[str, int], said: Said, where: str) -> None:
    """Make the tokens special that are named so."""
    missing = []
    for name in (*filter(None, said.names.values()), *said.others):
        if name in by_name:
            by_name[name]["special"] = True
        elif name in vocabulary:
            entries.append({"id": vocabulary[name], "content": name, **_FLAGS})
            by_name[name] = entries[-1]
        elif name in said.others:
            missing.append(name)
    if missing:
        shown = ", ".join(ascii(each[:40]) for each in missing[:8])
        warn(f"{where}: {shown}: called special tokens beside it, and no tokens of it; left out.")


def _marks(by_name: Mapping[Any, Any], templates: Iterable[str], named: Any) -> frozenset[str]:
    """Added tokens, not special, that a template writes or that look like what templates write."""
    names = [
        name
        for name, each in by_name.items()
        if isinstance(name, str) and not name.strip().isalnum() and name.strip() and not each.get("special")
    ]
    named = set(named) if isinstance(named, list) and all(isinstance(each, str) for each in named) else set()
    texts = list(templates)
    return frozenset(
        name for name in names if name in named or _BRACKETS.fullmatch(name) or any(name in text for text in texts)
    )


def _set_space(whole: dict[str, Any], space: bool) -> bool:
    """Put a space before a text, or none, where it is known of the steps how; whether that changed anything."""
    before = [whole.get(kind) for kind in _SPACED]
    step, normalizer, decoder = (each if isinstance(each, dict) else {} for each in before)
    if step.get("type") == "ByteLevel":  # within a sequence it would put one before each word
        whole["pre_tokenizer"] = {**step, "add_prefix_space": space}
    elif step.get("type") == "Metaspace":
        scheme = step.get("prepend_scheme", "always")
        scheme = "first" if space and scheme == "never" else scheme if space else "never"
        whole["pre_tokenizer"] = {**step, "prepend_scheme": scheme}
    steps = normalizer.get("normalizers")
    if not space and isinstance(steps, list) and steps and _kind(steps[0]) == "Prepend":
        whole["normalizer"] = steps[1] if len(steps) == 2 else {**normalizer, "normalizers": steps[1:]}
    last = decoder.get("decoders")
    if not space and isinstance(last, list) and last and _kind(last[-1]) == "Strip":
        whole["decoder"] = {**decoder, "decoders": last[:-1]}
    return before != [whole.get(kind) for kind in _SPACED]


def _kind(step: Any) -> Any:
    return step.get("type") if isinstance(step, dict) else None
