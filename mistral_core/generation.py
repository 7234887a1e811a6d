"""GenerationConfig: how text is continued, checked by name and value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import strict_json
from .config import MistralConfig
from .config_checks import is_int
from .errors import EmptyInputError, GenerationConfigError, SequenceTooLongError
from .validate import Array

GREEDY: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "use_cache": (True, None),
    "streamer": (None,),
    "assistant_model": (None,),
    "return_dict_in_generate": (False, None),
}
"""transformers' options of `generate` -> their values that mean greedy decoding of one sequence a row, as here."""
COMPILE = ("auto", "off", "on")
CACHE = ("auto", "full", "rolling")


@dataclass(unsafe_hash=True)
class GenerationConfig:
    """Options of `generate`; greedy decoding.

    `max_new_tokens` may be 0: the prompt comes back unchanged. `max_length` counts the prompt's columns too, and
    stands instead of `max_new_tokens` where it is given. `eos_token_id` is an int, several, or None; a row
    ends with
    the first one it generates and then emits `pad_token_id` (the first end-of-sequence id where that is None).
    `cache` is rolling where the model has a window unless `full` is asked for. `extra` keeps the keys of a file that
    this class does not know. An assignment (`model.generation_config.pad_token_id = 2`, as training libraries write)
    is checked when it is used.
    """

    max_new_tokens: int = 20
    max_length: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    cache: str = "auto"
    compile: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read generation_config.json of a directory; values are checked when they are used."""
        return cls.from_dict(
            strict_json.read_object(Path(path) / "generation_config.json", error=GenerationConfigError)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """From a generation_config.json dictionary."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key in known
        }
        if "max_new_tokens" in fields:
            fields.pop("max_length", None)  # which it outranks
        return cls(**fields, extra={key: value for key, value in data.items() if key not in known})

    @classmethod
    def from_model_config(cls, config: MistralConfig) -> GenerationConfig:
        """The token ids of a model's config."""
        return cls(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The generation_config.json dictionary, unknown keys included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = fields.pop("extra")
        if self.max_length is None:
            del fields["max_length"]  # transformers takes null for a length
        return {**extra, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some options changed; raises GenerationConfigError for a name that is none.

        `max_new_tokens` puts a `max_length` out of force. transformers' options for greedy decoding change nothing.
        """
        changes = {k: v for k, v in changes.items() if not any(v is greedy for greedy in GREEDY.get(k, ()))}
        known = {f.name for f in dataclasses.fields(self)}
        other = sorted(set(changes) & set(GREEDY))
        if other:
            raise GenerationConfigError(f"generate is greedy and returns ids alone; leave out {', '.join(other)}.")
        unknown = sorted(set(changes) - known)
        if unknown:
            raise GenerationConfigError(f"generate has no option {unknown}; it has {sorted(known - {'extra'})}.")
        if changes.get("max_new_tokens") is not None:
            changes = {"max_length": None, **changes}
        return dataclasses.replace(self, **changes)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if is_int(self.eos_token_id) else tuple(self.eos_token_id)  # type: ignore[arg-type,return-value]

    @property
    def padding(self) -> int:
        """What an ended row emits."""
        return self.pad_token_id if self.pad_token_id not in (None, -1) else (*self.eos_token_ids, 0)[0]

    def for_prompt(self, columns: int) -> GenerationConfig:
        """A copy whose `max_new_tokens` is in force for a prompt of so many columns; raises GenerationConfigError."""
        if self.max_length is None:
            return self
        if not is_int(self.max_length) or self.max_length < columns:
            raise GenerationConfigError(
                f"max_length: {self.max_length!r}, but the prompt has {columns} columns; give max_new_tokens instead."
            )
        return self.replace(max_new_tokens=self.max_length - columns)

    def check(self, config: MistralConfig) -> None:
        """Raise GenerationConfigError with every option that means nothing for a model."""
        problems = []
        if not is_int(self.max_new_tokens) or self.max_new_tokens < 0:
            problems.append(f"max_new_tokens: {self.max_new_tokens!r}, an integer of 0 or more was expected")
        for name, value in (
            *(("eos_token_id", token) for token in self.eos_token_ids),
            ("pad_token_id", self.padding),
        ):
            if not is_int(value) or not 0 <= value < config.vocab_size:
                problems.append(f"{name}: {value!r}, 0 to {config.vocab_size - 1} was expected")
        for name, choices in (("cache", CACHE), ("compile", COMPILE)):
            if getattr(self, name) not in choices:
                problems.append(f"{name}: {getattr(self, name)!r}, one of {', '.join(choices)} was expected")
        if problems:
            raise GenerationConfigError("; ".join(problems) + ".")


def check_prompt(config: MistralConfig, generation: GenerationConfig, mask_BT: Array) -> None:
    """Every row must hold a token, and what is to come must fit; raises EmptyInputError, SequenceTooLongError."""
    lengths = mask_BT.sum(axis=1)
    empty = [int(row) for row in (lengths == 0).nonzero()[0]]
    if empty:
        raise EmptyInputError(f"attention_mask: rows {empty} are all padding; there is nothing to continue.")
    total = int(lengths.max()) + generation.max_new_tokens
    if total > config.max_position_embeddings:
        raise SequenceTooLongError(
            f"{lengths.max()} tokens and {generation.max_new_tokens} new ones are {total}, max_position_embeddings is "
            f"{config.max_position_embeddings}; ask for fewer new tokens."
        )
