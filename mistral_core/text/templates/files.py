"""The chat templates of a checkpoint, by name: the files and fields they are in, and which of them is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...disk import limits, reading, strict_json
from ...disk.files import check_bare_name
from ...errors import TemplateError, UnsafeFileError
from .sandbox.worker import MAX_TEMPLATE_BYTES

FILE = "chat_template.jinja"
OLD_FILE = "chat_template.json"
DIRECTORY = "additional_chat_templates"
MAX_TEMPLATES = limits.TEMPLATES
DEFAULT, WITH_TOOLS = "default", "tool_use"


def read(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template of a checkpoint's directory and its tokenizer_config.json; empty where there is none.

    A file goes before the field of the config; chat_template.json counts where there is neither. Raises TemplateError,
    LimitExceededError, UnsafeFileError (no regular file, a name that is a path).
    """
    root = reading.held(reading.as_path(directory))
    found = of_field(config.get("chat_template"), "tokenizer_config.json: chat_template")
    if (root / FILE).exists():
        found[DEFAULT] = _read_file(root / FILE)
    found |= _of_directory(root / DIRECTORY)
    if not found and (root / OLD_FILE).exists():
        old = strict_json.read_object(root / OLD_FILE, error=TemplateError)
        found = of_field(old.get("chat_template"), str(root / OLD_FILE))
    return found


def choose(templates: Mapping[str, str], *, name: str | None = None, tools: bool = False) -> str:
    """The template of a name; without one "tool_use" where there are tools, "default" else, as transformers does.

    Raises TemplateError where there is no such template.
    """
    if name is None:
        name = WITH_TOOLS if tools and WITH_TOOLS in templates else DEFAULT
    if name not in templates:
        known = ", ".join(sorted(templates)) or "none"
        raise TemplateError(
            f"chat_template: no template {name!r}, this checkpoint has {known}; name one, or pass its text."
        )
    return templates[name]


def of_field(value: Any, where: str) -> dict[str, str]:
    """The templates of a field of a config: a string, or a list of names and templates; raises TemplateError."""
    if value is None:
        return {}
    pairs = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    if not isinstance(pairs, list) or len(pairs) > MAX_TEMPLATES:
        raise TemplateError(
            f"{where} must be a string or at most {MAX_TEMPLATES} templates, got {type(value).__name__}."
        )
    found: dict[str, str] = {}
    for each in pairs:
        name, text = (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or name in found:
            raise TemplateError(
                f"{where} must be a name of its own and a template, both strings, got {str(each)[:80]!r}."
            )
        check_bare_name(name, where)  # saved, it is the name of a file
        found[name] = _checked(text.encode("utf-8", "surrogatepass"), where)
    return found


def _of_directory(directory: Path) -> dict[str, str]:
    if not directory.is_dir():
        return {}
    if directory.is_symlink():
        raise UnsafeFileError(f"{directory}: a link to a directory; put the directory itself there.")
    paths = [directory / name for name in reading.names(directory) if name.endswith(".jinja")]
    if len(paths) > MAX_TEMPLATES:
        raise TemplateError(f"{directory}: {len(paths)} templates, at most {MAX_TEMPLATES} are read; remove some.")
    for path in paths:
        check_bare_name(path.name, str(directory))
    return {path.stem: _read_file(path) for path in paths}


def _read_file(path: Path) -> str:
    return _checked(reading.head(path, MAX_TEMPLATE_BYTES + 1), str(path))


def _checked(data: bytes, where: str) -> str:
    if len(data) > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"{where}: longer than {MAX_TEMPLATE_BYTES} bytes; shorten it.")
    try:
        return data.decode()
    except UnicodeDecodeError as cause:
        raise TemplateError(f"{where}: not UTF-8 at byte {cause.start}; save it as UTF-8.") from cause
