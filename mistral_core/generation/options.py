"""GenerationConfig: how text is continued, checked by name and value."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import MistralConfig
from ..disk import files, into, limits, strict_json
from ..disk.reading import as_path
from ..errors import GenerationConfigError
from ..hub import download
from ..plain import is_int
from ..telling import warn
from .checks import CHECKS, IGNORED, biases, effective, explained, problems, several

__all__ = ["CHECKS", "IGNORED", "GenerationConfig"]

FILE = "generation_config.json"
PAIRS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
"""What counts new tokens, and what counts the prompt's columns too and is outranked by it."""

RARE = (
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length",
    "exponential_decay_length_penalty", "sequence_bias", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
"""Options that a file of a Mistral has no reason to hold; where one does, that is said."""


@dataclass(unsafe_hash=True)
class GenerationConfig:
    """Options of `generate`, by transformers' names and with its defaults; an assignment is checked when it is used.

    How much: `max_new_tokens` may be 0: the prompt comes back unchanged. `max_length` counts the prompt's columns
    too, and stands instead of `max_new_tokens` where that is not given; `min_length` and `min_new_tokens` likewise.
    `max_time` is in seconds. A row ends with the first of `eos_token_id` (an int, several, or None) that it generates,
    or where its new text holds one of `stop_strings`, and then emits `pad_token_id` (the first end-of-sequence id where
    that is None). `forced_bos_token_id` follows a prompt of one column, `forced_eos_token_id` is the last of
    `max_new_tokens`.

    Which token: the likeliest one, or with `do_sample` a draw from what `temperature`, `top_k`, `top_p`, `min_p`,
    `typical_p`, `epsilon_cutoff` and `eta_cutoff` leave, in this order. `logit_bias` {id: number} and `sequence_bias`
    [[ids, number], ...] are added to the logits. After the first n of `exponential_decay_length_penalty` (n, factor)
    the end becomes likelier with every token. `seed` is an int, of which row r uses stream r, or one int for each row:
    then a row gives the same tokens alone and in any batch. The same seed gives the same tokens in every framework.

    How: `cache` is rolling where the model has a window unless `full` is asked for. `cache_dtype` int8 keeps keys and
    values rounded, in about half of bfloat16's memory; auto is the model's own dtype, or that of a cache that is given.
    `prefill_chunk_size` is the most columns of the prompt that are computed at once. `prompt_lookup_num_tokens` guesses
    so many tokens a step from the text so far, an assistant model guesses `num_assistant_tokens`; both change the speed
    and not the tokens. `compile` is described in each backend's `generate`. `on_device_loop` runs all steps in one
    compiled loop, for accelerators. `extra` keeps the keys of a file that this class does not know. What was not said
    is, in a call, the checkpoint's own.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    max_length: int | None = None
    min_length: int = 0
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
    epsilon_cutoff: float | None = 0.0
    eta_cutoff: float | None = 0.0
    renormalize_logits: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    sequence_bias: Any = field(default=None, hash=False)
    seed: int | tuple[int, ...] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5
    cache: str = "auto"
    cache_dtype: str = "auto"
    prefill_chunk_size: int | None = None
    compile: str = "auto"
    on_device_loop: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __new__(cls, *values: Any, **options: Any) -> GenerationConfig:
        """Remember which options were said."""
        made = super().__new__(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        object.__setattr__(made, "_said", frozenset([*names[: len(values)], *options]))
        return made

    def __post_init__(self) -> None:
        object.__setattr__(self, "_is_made", True)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; arrays and lists are kept as tuples, so that a config can be part of a compiled function."""
        object.__setattr__(self, name, _frozen(value))
        if "_is_made" in self.__dict__:
            object.__setattr__(self, "_said", self._said | {name})

    _said = frozenset[str]()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], config_file_name: str = FILE, **options: Any
    ) -> GenerationConfig:
        """Read generation_config.json of a directory or a hub id; values are checked when they are used.

        `options` are the hub's (`revision`, `cache_dir`, `token`, `local_files_only`) and options of `generate`.
        """
        files.check_bare_name(config_file_name, "config_file_name")
        hub_arguments = {key: options.pop(key) for key in download.ARGUMENTS if key in options}
        is_name = isinstance(path, str)  # or a directory, which may be held open
        root = download.resolve(path, files=(config_file_name,), **hub_arguments) if is_name else as_path(path)
        file = root if root.is_file() else root / config_file_name
        config = cls.from_dict(strict_json.read_object(file, error=GenerationConfigError), where=str(file))
        return config.replace(**options) if options else config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = FILE) -> GenerationConfig:
        """From a generation_config.json dictionary; null is a field's default.

        Warns of options that might change a token and are not here. Raises GenerationConfigError where beams or
        sequences are more than a file may ask for.
        """
        config = cls._from_dict(data)
        if options := effective(config.extra):
            warn(
                f"{where}: options that are not used here, so tokens may be others than elsewhere: "
                f"{explained(options, config.__dict__)}."
            )
        rare = [name for name in RARE if getattr(config, name) != getattr(GenerationConfig, name)]
        if rare:
            warn(
                f"{where}: every answer is shaped by {', '.join(rare)}; give generate other values where that is not "
                "wanted."
            )
        for name in ("num_beams", "num_return_sequences"):
            if is_int(count := getattr(config, name)):
                limits.check(count, limits.SEQUENCES, what=name, where=where, error=GenerationConfigError)
        return config

    @classmethod
    def _from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields: dict[str, Any] = {key: value for key, value in data.items() if key in known and value is not None}
        if isinstance(bias := fields.get("logit_bias"), Mapping):  # whose keys are text in JSON
            fields["logit_bias"] = {_id(key): value for key, value in bias.items()}
        for new, whole in PAIRS:
            if new in fields:
                fields.pop(whole, None)  # which it outranks
        return cls(**fields, extra={key: value for key, value in data.items() if key not in known})

    @classmethod
    def of(cls, config: Any) -> GenerationConfig:
        """One of these, from itself, a dictionary or transformers' class of this name.

        Raises GenerationConfigError for anything else, and for an option that would change a token and is not here.
        """
        if isinstance(config, cls):
            return config
        write = getattr(config, "to_diff_dict", None) or getattr(config, "to_dict", None)
        data = config if isinstance(config, Mapping) else write() if callable(write) else None
        if not isinstance(data, Mapping):
            raise GenerationConfigError(f"generation_config must be a GenerationConfig, got {type(config).__name__}.")
        made = cls._from_dict(data)
        if options := effective({name: value for name, value in made.extra.items() if value is not None}):
            raise GenerationConfigError(f"generation_config: {explained(options, made.__dict__)}.")
        return made

    @classmethod
    def from_model_config(cls, config: MistralConfig) -> GenerationConfig:
        """The token ids of a model's config."""
        config = MistralConfig.of(config)
        return cls(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The generation_config.json dictionary: what is not None, unknown keys included."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = fields.pop("extra")
        if isinstance(fields["sequence_bias"], Mapping):  # whose keys are no text
            fields["sequence_bias"] = tuple([list(ids), number] for ids, number in biases(fields["sequence_bias"]))
        return {**extra, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if v is not None}}

    def to_diff_dict(self) -> dict[str, Any]:
        """Those of `to_dict` that are not the default."""
        default = GenerationConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if key not in default or default[key] != value}

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict`, or `to_dict`, as the text of a generation_config.json."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | os.PathLike[str], config_file_name: str = FILE) -> None:
        """Write generation_config.json into a directory, which is made where there is none."""
        files.check_bare_name(config_file_name, "config_file_name")
        into.write_into(directory, {config_file_name: self.to_json_string().encode()})

    def update(self, **options: Any) -> dict[str, Any]:
        """Set the options that there are; returns those that there are not."""
        known = {f.name for f in dataclasses.fields(self)} - {"extra"}
        for name in options.keys() & known:
            setattr(self, name, options[name])
        return {name: value for name, value in options.items() if name not in known}

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some options changed; raises GenerationConfigError for a name that is none.

        `max_new_tokens` puts a `max_length` out of force. None is the default where it is no value of the option.
        transformers' other options are taken where they change nothing.
        """
        fields = {f.name: f for f in dataclasses.fields(self)}
        unknown = effective({name: value for name, value in changes.items() if name not in fields})
        if unknown:
            raise GenerationConfigError(f"generate: {explained(unknown, fields)}.")
        given = {name: value for name, value in changes.items() if name in fields}
        changes = {name: fields[name].default if _is_unset(name, value) else value for name, value in given.items()}
        for new, whole in PAIRS:
            if given.get(new) is not None:
                if given.get(whole):
                    warn(f"{whole}: {new} is given too and counts; give one of them.")
                changes[whole] = fields[whole].default
        made = dataclasses.replace(self, **changes)
        object.__setattr__(made, "_said", self._said | changes.keys())
        return made

    def over(self, own: GenerationConfig) -> GenerationConfig:
        """These options, and where one was not said that of the checkpoint."""
        rest = {f.name: getattr(own, f.name) for f in dataclasses.fields(self) if f.name not in {*self._said, "extra"}}
        for new, whole in PAIRS:
            if new in self._said:
                rest.pop(whole, None)
        made = dataclasses.replace(self, **rest)
        object.__setattr__(made, "_said", self._said | own._said)
        return made

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a row; -1 alone is none, as transformers' users write."""
        return () if self.eos_token_id == -1 else several(self.eos_token_id)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a row."""
        return several(self.stop_strings)

    @property
    def padding(self) -> int:
        """What an ended row emits."""
        return self.pad_token_id if self.pad_token_id not in (None, -1) else (*self.eos_token_ids, 0)[0]

    def for_prompt(self, columns: int) -> GenerationConfig:
        """A copy whose counts of new tokens are in force for a prompt of so many columns.

        Raises GenerationConfigError where the prompt is longer than `max_length`.
        """
        most = self.max_new_tokens
        if self.max_length is not None:
            if not is_int(self.max_length) or self.max_length < columns:
                raise GenerationConfigError(
                    f"max_length: {self.max_length!r}, but the prompt has {columns} columns; give max_new_tokens "
                    "instead."
                )
            most = self.max_length - columns
        least = self.min_new_tokens
        if is_int(self.min_length) and self.min_length > columns and is_int(most):
            least = min(self.min_length - columns, most)
        forced = self.forced_bos_token_id if columns == 1 else None
        changes: dict[str, Any] = {"max_new_tokens": most, "min_new_tokens": least, "forced_bos_token_id": forced}
        changes |= {"min_length": 0} if is_int(self.min_length) else {}
        made = dataclasses.replace(self, **changes, max_length=None)
        object.__setattr__(made, "_said", self._said)
        return made

    def check(self, config: MistralConfig) -> None:
        """Raise GenerationConfigError with every option that means nothing, alone, together or for a model."""
        if found := problems(self, config):
            raise GenerationConfigError("; ".join(found[:8]) + ".")

    @property
    def looks_back(self) -> bool:
        """Whether a token depends on the text so far otherwise than through the model."""
        return self.repetition_penalty != 1 or self.forbids

    @property
    def forbids(self) -> bool:
        """Whether something is added to the logits that depends on the text so far or its length."""
        return bool(
            self.no_repeat_ngram_size or self.bad_words_ids or self.min_new_tokens or self.sequence_bias
            or self.suppress_tokens or self.begin_suppress_tokens or self.forced_bos_token_id is not None
            or self.forced_eos_token_id is not None
        )  # fmt: skip

    @property
    def is_chosen_by_core(self) -> bool:
        """Whether an option is in force that no backend's own step has: then tokens are chosen in NumPy."""
        sampled = self.do_sample and bool(self.epsilon_cutoff or self.eta_cutoff)
        forced = self.forced_bos_token_id is not None or self.forced_eos_token_id is not None
        return bool(sampled or forced or self.exponential_decay_length_penalty or self.renormalize_logits)


def _id(key: Any) -> Any:
    """A key of a JSON object as the id it writes, where it does."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key


def _is_unset(name: str, value: Any) -> bool:
    """Whether None is given for an option of which it is no value."""
    return value is None and name in CHECKS and not CHECKS[name][0](None)


def _frozen(value: Any) -> Any:
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array of NumPy or a framework
        value = value.numpy() if hasattr(value, "numpy") and not hasattr(value, "tolist") else value
        value = value.tolist()
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
