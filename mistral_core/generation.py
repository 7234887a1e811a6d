"""GenerationConfig: how text is continued, checked by name and value."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import strict_json
from .config import MistralConfig
from .config_checks import is_int, is_number
from .disk.reading import as_path
from .errors import EmptyInputError, GenerationConfigError, SequenceTooLongError
from .validate import Array

IGNORED: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (True, False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "output_logits": (False, None),
    "num_beam_groups": (1, None),
    "diversity_penalty": (0.0, None),
    "epsilon_cutoff": (0.0, None),
    "eta_cutoff": (0.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "penalty_alpha": (None,),
    "renormalize_logits": (False, None),
    "logits_processor": (None,),
    "stopping_criteria": (None,),
    "synced_gpus": (False, None),
}
"""transformers' options of `generate` that are none here -> their values that change no token, which are taken."""
COMPILE = ("auto", "off", "on", "max")
CACHE = ("auto", "full", "rolling")


@dataclass(unsafe_hash=True)
class GenerationConfig:
    """Options of `generate`, by transformers' names and with its defaults; an assignment is checked when it is used.

    How much: `max_new_tokens` may be 0: the prompt comes back unchanged. `max_length` counts the prompt's columns
    too, and stands instead of `max_new_tokens` where it is given. `max_time` is in seconds. A row ends with the first
    of `eos_token_id` (an int, several, or None) that it generates, or where its new text holds one of `stop_strings`,
    and then emits `pad_token_id` (the first end-of-sequence id where that is None).

    Which token: the likeliest one, or with `do_sample` a draw from what `temperature`, `top_k`, `top_p`, `min_p` and
    `typical_p` leave, in this order. `logit_bias` {id: number} is added to the logits. `seed` is an int, of which row
    r uses stream r, or one int for each row: then a row gives the same tokens alone and in any batch. The same seed
    gives the same tokens in every framework.

    How: `cache` is rolling where the model has a window unless `full` is asked for. `prefill_chunk_size` is the most
    columns of the prompt that are computed at once. `prompt_lookup_num_tokens` guesses so many tokens a step from the
    text so far, an assistant model guesses `num_assistant_tokens`; both change the speed and not the tokens.
    `compile` is told of in each backend's `generate`. `on_device_loop` runs all steps in one compiled loop, for
    accelerators. `extra` keeps the keys of a file that this class does not know.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    max_length: int | None = None
    max_time: float | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | tuple[int, ...] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5
    cache: str = "auto"
    prefill_chunk_size: int | None = None
    compile: str = "auto"
    on_device_loop: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; lists are kept as tuples, so that a config can be part of what a function is compiled for."""
        object.__setattr__(self, name, _frozen(value))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> GenerationConfig:
        """Read generation_config.json of a directory; values are checked when they are used."""
        return cls.from_dict(
            strict_json.read_object(as_path(path) / "generation_config.json", error=GenerationConfigError)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """From a generation_config.json dictionary; null is a field's default."""
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields: dict[str, Any] = {key: value for key, value in data.items() if key in known and value is not None}
        if isinstance(bias := fields.get("logit_bias"), Mapping):  # whose keys are text in JSON
            fields["logit_bias"] = {int(k) if str(k).isdigit() else k: v for k, v in bias.items()}
        if "max_new_tokens" in fields:
            fields.pop("max_length", None)  # which it outranks
        return cls(**fields, extra={key: value for key, value in data.items() if key not in known})

    @classmethod
    def from_model_config(cls, config: MistralConfig) -> GenerationConfig:
        """The token ids of a model's config."""
        return cls(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The generation_config.json dictionary: what is not None, unknown keys included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = fields.pop("extra")
        return {**extra, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if v is not None}}

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some options changed; raises GenerationConfigError for a name that is none.

        `max_new_tokens` puts a `max_length` out of force. transformers' other options are taken where they change
        nothing.
        """
        changes = {k: v for k, v in changes.items() if not any(v is none or v == none for none in IGNORED.get(k, ()))}
        known = {f.name for f in dataclasses.fields(self)} - {"extra"}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise GenerationConfigError(f"generate has no option {unknown}; it has {sorted(known)}.")
        if changes.get("max_new_tokens") is not None:
            changes = {"max_length": None, **changes}
        return dataclasses.replace(self, **changes)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row."""
        return _several(self.eos_token_id)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a row."""
        return _several(self.stop_strings)

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
        """Raise GenerationConfigError with every option that means nothing, alone, together or for a model."""
        problems = [
            f"{name}: {getattr(self, name)!r}, {expected} was expected"
            for name, (is_right, expected) in CHECKS.items()
            if not is_right(getattr(self, name))
        ]
        if not problems:
            problems = [*self._wrong_ids(config), *self._contradictions()]
        if problems:
            raise GenerationConfigError("; ".join(problems) + ".")

    def _wrong_ids(self, config: MistralConfig) -> list[str]:
        ids = {
            "eos_token_id": self.eos_token_ids,
            "pad_token_id": (self.padding,),
            "bad_words_ids": [token for word in self.bad_words_ids or () for token in word],
            "logit_bias": self.logit_bias or (),
        }
        return [
            f"{name}: {token!r}, 0 to {config.vocab_size - 1} was expected"
            for name, tokens in ids.items()
            for token in tokens
            if not is_int(token) or not 0 <= token < config.vocab_size
        ]

    def _contradictions(self) -> list[str]:
        sampled, beams = self.do_sample and self.temperature != 0, self.num_beams > 1
        guesses = self.prompt_lookup_num_tokens is not None
        found = {
            f"min_new_tokens: {self.min_new_tokens} are more than max_new_tokens ({self.max_new_tokens})":
                self.min_new_tokens > self.max_new_tokens,
            f"num_return_sequences: {self.num_return_sequences} equal sequences; give do_sample=True or num_beams":
                self.num_return_sequences > 1 and not sampled and not beams,
            f"num_return_sequences: {self.num_return_sequences} of {self.num_beams} beams; take more beams":
                beams and self.num_return_sequences > self.num_beams,
            "stop_strings: beams are not ended by them; use num_beams=1": beams and bool(self.stops),
            "prompt_lookup_num_tokens: beams are not guessed; use num_beams=1": beams and guesses,
            "on_device_loop: it takes neither beams, stop_strings, max_time, output_scores, prompt_lookup_num_tokens "
            "nor options that look back (repetition_penalty, no_repeat_ngram_size, bad_words_ids, min_new_tokens); "
            "drop one": self.on_device_loop
            and (beams or bool(self.stops) or guesses or self.looks_back or self.output_scores or bool(self.max_time)),
        }  # fmt: skip
        return [problem for problem, holds in found.items() if holds]

    @property
    def looks_back(self) -> bool:
        """Whether a token depends on the text so far otherwise than through the model."""
        return bool(
            self.repetition_penalty != 1 or self.no_repeat_ngram_size or self.bad_words_ids or self.min_new_tokens
        )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return lambda v: any(v is c or (v == c and type(v) is type(c)) for c in choices), f"one of {choices}"


def _integer(low: int, *, or_none: bool = False) -> tuple[Callable[[Any], bool], str]:
    def is_right(v: Any) -> bool:
        return (or_none and v is None) or (is_int(v) and v >= low)

    return is_right, f"an integer of {low} or more{' or None' if or_none else ''}"


def _number(
    is_right: Callable[[float], bool], what: str, *, or_none: bool = False
) -> tuple[Callable[[Any], bool], str]:
    return lambda v: (or_none and v is None) or (is_number(v) and math.isfinite(v) and is_right(v)), what


def _is_list_of_words(value: Any) -> bool:
    return value is None or (isinstance(value, tuple) and all(isinstance(w, tuple) and w for w in value))


def _is_seed(value: Any) -> bool:
    return value is None or (value != () and all(is_int(s) and 0 <= s < 2**64 for s in _several(value)))


CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": _integer(0),
    "min_new_tokens": _integer(0),
    "max_time": _number(lambda v: v > 0, "seconds above 0 or None", or_none=True),
    "stop_strings": (
        lambda v: all(isinstance(s, str) and s for s in _several(v)),
        "a text that is not empty, or several",
    ),
    "do_sample": _one_of(False, True),
    "temperature": _number(lambda v: v >= 0, "a number of 0 or more (0: the likeliest token)"),
    "top_k": _integer(0, or_none=True),
    "top_p": _number(lambda v: 0 < v <= 1, "a number above 0 and up to 1", or_none=True),
    "min_p": _number(lambda v: 0 <= v <= 1, "a number from 0 to 1", or_none=True),
    "typical_p": _number(lambda v: 0 < v <= 1, "a number above 0 and up to 1", or_none=True),
    "repetition_penalty": _number(lambda v: v > 0, "a number above 0"),
    "no_repeat_ngram_size": _integer(0),
    "bad_words_ids": (_is_list_of_words, "a list of lists of ids, none of them empty,"),
    "logit_bias": (
        lambda v: v is None or (isinstance(v, Mapping) and all(is_number(x) for x in v.values())),
        "a dictionary of ids and finite numbers",
    ),
    "seed": (_is_seed, "an integer from 0 to 2^64 - 1, or one for each row,"),
    "num_beams": _integer(1),
    "length_penalty": _number(lambda v: True, "a finite number"),
    "early_stopping": _one_of(False, True, "never"),
    "num_return_sequences": _integer(1),
    "return_dict_in_generate": _one_of(False, True),
    "output_scores": _one_of(False, True),
    "prompt_lookup_num_tokens": _integer(1, or_none=True),
    "max_matching_ngram_size": _integer(1),
    "num_assistant_tokens": _integer(1),
    "cache": _one_of(*CACHE),
    "prefill_chunk_size": _integer(1, or_none=True),
    "compile": _one_of(*COMPILE),
    "on_device_loop": _one_of(False, True),
}
"""Option -> what its values are, and in words."""


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
    if isinstance(generation.seed, tuple) and len(generation.seed) != len(mask_BT):
        raise GenerationConfigError(
            f"seed: {len(generation.seed)} for {len(mask_BT)} rows; give one int, or one a row."
        )
