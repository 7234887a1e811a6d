"""The instruct versions of Mistral's tokenizers: one row says how a version writes a conversation."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ...errors import TemplateError

Style = Literal["none", "list", "list+id", "object+id", "marks+id", "marks"]


class Version(NamedTuple):
    """What differs between versions; the ids of the control tokens are the tokenizer's."""

    system: Literal["first", "last", "own"]
    """Where a system prompt stands: in the text of the first or last user message, or between tokens of its own."""
    tools: Literal["none", "first", "last"]
    """Before which user message the definitions of tools stand; the settings of v15 follow them."""
    calls: Style
    """Calls of tools: a JSON list (with ids), or each between tokens of its own."""
    results: Style
    """Results of tools: one JSON list or object each, or the text between tokens of its own."""
    history: bool
    """Whether calls and results before the last user message are written."""
    call_id: Literal["free", "nine", "some"]
    """What a call id must be: anything, nine letters and digits, or any text but "null"."""
    pairs: Literal["count", "id"]
    """What must agree between calls and results; by id, results are put into the order of the calls."""
    mixed: bool
    """Whether an answer may hold text and calls."""
    thinking: tuple[str, ...]
    """Roles whose content may hold thinking chunks."""
    joint: str = "\n\n"
    """What stands between two text chunks of one message; two messages of one role have an empty line between."""
    settings: bool = False
    """Whether the settings of the model are written."""


# fmt: off
VERSIONS = {
    #              system   tools    calls       results      history call_id pairs    mixed  thinking
    "v1":  Version("first", "none",  "none",     "none",      True,   "free", "count", False, ()),
    "v2":  Version("last",  "last",  "list",     "list",      False,  "free", "count", False, ()),
    "v3":  Version("last",  "last",  "list+id",  "object+id", True,   "nine", "count", False, ()),
    "v7":  Version("own",   "last",  "list+id",  "marks+id",  True,   "nine", "count", True,  ()),
    "v11": Version("own",   "last",  "marks+id", "marks+id",  True,   "nine", "id",    True,  ()),
    "v13": Version("own",   "first", "marks",    "marks",     True,   "some", "id",    True,  ("assistant", "system")),
    "v15": Version("own",   "first", "marks",    "marks",     True,   "some", "id",    True,  ("assistant",), "", True),
}
# fmt: on
"""Version by the name that tokenizer files give it; v1 writes [INST] as plain text, the others as control tokens."""


def version_named(name: str) -> Version:
    """The row of a version; raises TemplateError for a name that is none."""
    if name not in VERSIONS:
        raise TemplateError(f"version must be one of {', '.join(VERSIONS)}, got {name!r}.")
    return VERSIONS[name]
