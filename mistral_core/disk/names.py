"""The names of a checkpoint's small files: configs, and the texts that travel with the weights."""

from __future__ import annotations

from pathlib import Path

from . import limits, reading

CONFIG_FILES = ("config.json", "params.json")

TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
    *(f"tokenizer.model{version}" for version in ("", ".v1", ".v2", ".v3", ".v7", ".v7m1")),
    "LICENSE",
    "NOTICE",
)
"""What travels with the weights, by Hugging Face's names."""

VISION_FILES = ("processor_config.json", "preprocessor_config.json")
"""What travels with the weights of a vision tower."""

TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates, which travel too."""


def template_names(directory: Path) -> list[str]:
    """The chat templates that a directory has beside the usual one, by their names below it."""
    folder = directory / TEMPLATES
    if not folder.is_dir():
        return []
    found = [f"{TEMPLATES}/{name}" for name in reading.names(folder) if is_template(f"{TEMPLATES}/{name}")]
    limits.check(len(found), limits.TEMPLATES, what="chat templates", where=str(folder))
    return found


def is_template(name: str) -> bool:
    """Whether a name below a directory, or in a repository, is that of a further chat template."""
    folder, _, file = name.partition("/")
    return folder == TEMPLATES and "/" not in file and file.endswith(".jinja") and not file.startswith(".")
