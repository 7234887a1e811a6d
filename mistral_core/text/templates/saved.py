"""A chat template in jinja that writes a built-in format, for libraries that know no other way.

A template writes one text, which is then encoded in one go, so that it cannot do all that the built-in formats do. In
transformers a control token that a message spells is one, unless `sanitize_control_tokens=True` says no; JSON in a
string stands as it was written; an answer to be continued loses line breaks at its end; a text after an open thought
is encoded together with it; v15 has the settings that the model begins with. Fewer malformed messages are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import data
from ..chat.model_settings import settings_text
from ..chat.versions import version_named
from ..coder import ALWAYS, FIRST

if TYPE_CHECKING:
    from jinja2 import Template

SOURCE = Path(data.__file__).parent / "chat_template.jinja"


def made(
    version: str, *, prefix: str | None, model_settings: Mapping[str, Any] | None = None, marked: bool = False
) -> str:
    """The template of a version, a key of VERSIONS, for a tokenizer.json that puts a space as `prefix` says.

    That is `Coder.prefix`: where the tokenizer puts no space before a text, the template does. `model_settings` is as
    in `chat.segments`. `marked` puts {% generation %} around answers, which not every reader of jinja knows. Raises
    TemplateError for another version, TokenizerError for malformed settings.
    """
    traits = version_named(version)
    settings = ""
    if traits.settings and model_settings is not None:
        settings = settings_text(model_settings, reasoning_effort=None, response_format=None)
    plain = traits.tools == "none"  # no control token stands between a question and its answer
    return _source().render(
        name=version,
        version=traits,
        prefix=prefix,
        spaced=prefix == FIRST or (prefix == ALWAYS and plain),
        place=traits.system if plain else traits.tools,
        settings=settings,
        marked=marked,
    )


@cache
def _source() -> Template:
    from jinja2 import Environment

    environment = Environment(
        block_start_string="<%", block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>", trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.from_string(SOURCE.read_text(encoding="utf-8"))
