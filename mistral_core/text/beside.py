"""What the files beside a vocabulary say of it: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Each key that transformers writes is honoured, or changes neither ids nor texts here, or is named in a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..disk import limits, strict_json
from ..errors import TokenizerError
from .inputs import check_side

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (CONFIG, MAP, ADDED)
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens that have a part to play here."""

INPUTS = ("input_ids", "attention_mask")
"""What a tokenizer makes for a model, by default."""
MADE = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_input_names": list(INPUTS),
}
"""A tokenizer_config.json where there was none; transformers 4 adds token_type_ids unless it is told of the inputs."""

LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys with more special tokens: lists, or dicts by names of their own."""

HONOURED = frozenset({
    *TOKENS, *LISTS, "added_tokens_decoder", "chat_template", "chat_control_tokens", "add_bos_token", "add_eos_token",
    "add_prefix_space", "legacy", "mode", "fix_mistral_regex", "model_input_names", "model_max_length", "padding_side",
    "truncation_side",
})  # fmt: skip
WITHOUT_EFFECT = frozenset({
    "tokenizer_class", "slow_tokenizer_class", "auto_map", "backend", "processor_class", "use_fast", "init_inputs",
    "name_or_path", "is_local", "local_files_only", "device_map", "trust_remote_code", "vocab_file", "merges_file",
    "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "chat_template_file", "from_slow", "vocab_size",
    "max_len", "max_length", "stride", "padding", "pad_to_multiple_of", "truncation", "truncation_strategy",
    "pad_token_type_id", "pad_token_label", "return_token_type_ids", "use_default_system_prompt",
    "split_special_tokens", "spaces_between_special_tokens", "response_schema", "response_template", "verbose",
    "transformers_version", "unk_id", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "_commit_hash",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "files_loaded", "image_size",
    "patch_size", "image_seq_length",
})  # fmt: skip
"""Where files are, whose class is meant, what a call may ask for anew, what slow tokenizers of others do."""
NOTHING = {"clean_up_tokenization_spaces": False, "errors": "replace", "sp_model_kwargs": {}, "add_dummy_prefix": True}
"""Keys that are named in a warning -> the value that changes nothing."""


class Said(NamedTuple):
    """What the files say."""

    config: dict[str, Any]
    """tokenizer_config.json."""
    names: dict[str, str | None]
    """The special tokens of `TOKENS` that are named."""
    others: tuple[str, ...]
    """Further special tokens."""
    added: dict[int, dict[str, Any]]
    """id -> a token that is added to the vocabulary, as an entry of tokenizer.json."""
    files: dict[str, bytes]
    """What else was read, saved again as it was."""
    told: tuple[str, ...] = ()
    """Keys that ask for what is not done, and their values."""


NOTHING_SAID = Said({}, {}, (), {}, {})


def read(files: Mapping[str, Callable[[], bytes]], where: str) -> Said:
    """What files say, by their readers; raises TokenizerError for malformed ones.

    As in transformers, the other two count where tokenizer_config.json has no added_tokens_decoder; then what
    special_tokens_map.json names goes before it.
    """
    found = {name: _object(files[name](), f"{where}: {name}") for name in FILES if name in files}
    config, at = found.get(CONFIG, {}), f"{where}: {CONFIG}"
    said = dict(config)
    if "added_tokens_decoder" not in config:
        said |= found.get(MAP, {})
    else:
        said = found.get(MAP, {}) | said
    names = {key: _content(said[key], f"{at}: {key}") for key in TOKENS if key in said}
    others = _others(said, at)
    special = {*others, *filter(None, names.values())}
    added = _decoder(config.get("added_tokens_decoder", {}), at)
    for token, number in found.get(ADDED, {}).items() if "added_tokens_decoder" not in config else ():
        entry = {"content": token, "special": token in special, "normalized": token not in special}
        added[_number(number, f"{where}: {ADDED}")] = _entry(entry, number, f"{where}: {ADDED}")
    kept = {name: files[name]() for name in (MAP, ADDED) if name in files}
    return Said(config, names, others, added, kept, _told(config))


def of_config(config: dict[str, Any], where: str) -> Said:
    """What a tokenizer_config.json alone says."""
    return read({CONFIG: json.dumps(config).encode}, where)


def with_names(text: bytes, names: Mapping[str, str | None]) -> bytes:
    """A special_tokens_map.json that names other tokens, byte for byte where it names these."""
    told: dict[str, Any] = json.loads(text)
    changed = {
        key: token
        for key, token in names.items()
        if key in told and token != (told[key].get("content") if isinstance(told[key], dict) else told[key])
    }
    if not changed:
        return text
    whole = {key: value for key, value in (told | changed).items() if value is not None}
    return (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode()


def setting(name: str, value: Any, where: str) -> Any:
    """A setting of a tokenizer_config.json; raises TokenizerError for one of another kind."""
    at = f"{where}: {CONFIG}: {name}"
    if name == "model_max_length":
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise TokenizerError(f"{at} must be a number of tokens, got {str(value)[:40]!a}.")
        return int(value)
    if name != "model_input_names":
        return check_side(at, value)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value) or "input_ids" not in value:
        raise TokenizerError(f"{at} must be a list of names, input_ids among them, got {str(value)[:80]!a}.")
    return tuple(value)


def flag(config: Mapping[str, Any], name: str, where: str) -> bool | None:
    """A key of a tokenizer_config.json that is true or false, or not there; raises TokenizerError for others."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{where}: {name} must be true or false, got {value!a}: correct {CONFIG}.")
    return value


def _object(data: bytes, where: str) -> dict[str, Any]:
    return strict_json.parse_object(data, where=where, error=TokenizerError)


def _told(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a tokenizer_config.json asks for and is not done."""
    asked = {key: value for key, value in config.items() if key not in HONOURED | WITHOUT_EFFECT}
    asked = {key: value for key, value in asked.items() if not _is_token(key, value)}
    return tuple(f"{key}: {str(value)[:40]!a}" for key, value in asked.items() if value not in (None, NOTHING.get(key)))


def _is_token(key: str, value: Any) -> bool:
    """Whether a key names one more special token: cls_token, image_token and the like."""
    return key.endswith("_token") and key not in HONOURED and (value is None or isinstance(value, str | dict))


def _content(token: Any, where: str) -> str | None:
    """The text of a token, which may be a serialized AddedToken; of a list, as old files have it, none."""
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(token, str):
        raise TokenizerError(f"{where} must be a token, got {str(token)[:80]!a}: correct it.")
    return token


def _others(said: Mapping[str, Any], where: str) -> tuple[str, ...]:
    listed: list[Any] = []
    for key in LISTS:
        value = said.get(key)
        listed += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    limits.check(len(listed), limits.SPECIAL_TOKENS, what="special tokens", where=where)
    listed += [value for key, value in said.items() if key not in TOKENS and _is_token(key, value)]
    found = (_content(each, f"{where}: special tokens") for each in listed)
    return tuple(dict.fromkeys(filter(None, found)))


def _decoder(entries: Any, where: str) -> dict[int, dict[str, Any]]:
    """The tokens of an added_tokens_decoder."""
    if not isinstance(entries, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder must be an object, got {type(entries).__name__}.")
    limits.check(len(entries), limits.SPECIAL_TOKENS, what="added tokens", where=where)
    return {_number(key, where): _entry(entry, _number(key, where), where) for key, entry in entries.items()}


def _number(given: Any, where: str) -> int:
    """The id of an added token."""
    number = int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise TokenizerError(f"{where}: the id {str(given)[:40]!a} of an added token; correct it.")
    return number


def _entry(entry: Any, number: int, where: str) -> dict[str, Any]:
    """An added token as an entry of tokenizer.json."""
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{where}: the added token {number} must have a content, got {str(entry)[:80]!a}.")
    limits.check(len(content), limits.TOKEN_CHARACTERS, what="characters of one token", where=where)
    flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    special = bool(entry.get("special", False))
    normalized = bool(entry.get("normalized", not special))
    return {"id": number, "content": content, **flags, "normalized": normalized, "special": special}
