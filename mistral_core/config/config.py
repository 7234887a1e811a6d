"""MistralConfig: one checked description of a model, read from and written to every dialect of config file.

The legend of axis letters, for the whole project:

    B batch            N query heads            V vocabulary
    T query positions  K key/value heads        W sliding window
    S key positions    G = N / K, group size    L layers
    D hidden size      H head dimension         C classes (labels)
                       F intermediate size
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..compat import arguments, unread
from ..compat.clients import path_by_either_name
from ..disk import into, reading, strict_json
from ..disk.names import CONFIG_FILES as CONFIG_FILES
from ..errors import CheckpointNotFoundError, ConfigError, FrozenConfigError, UnknownFieldError
from ..hub import download
from ..telling import near_miss, nearest, warn
from . import checks, dialects, model_types

NO_PROGRAM = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "extra",
    "id2label",
    "initializer_range",
    "label2id",
    "model_type",
)
"""What no compiled program of a model depends on."""
OF_SCORES = ("pad_token_id", "problem_type")
"""What only the programs of MistralForSequenceClassification depend on."""


def _of_any_names(kind: type[MistralConfig]) -> type[MistralConfig]:
    """Let a config be made with every argument of transformers' constructor: `torch_dtype`, `rope_parameters`, ...

    Absent fields mean what they mean to the model type.
    """
    with_fields = kind.__init__

    @functools.wraps(with_fields)
    def with_any_names(self: MistralConfig, *values: Any, **fields: Any) -> None:
        fields = _as_fields(fields)
        name = fields.get("model_type", "mistral")
        defaults = model_types.TYPES[name].defaults if model_types.is_known(name) else {}
        given = [field.name for field in dataclasses.fields(kind)][: len(values)]
        absent = {name: value for name, value in defaults.items() if name not in given}
        with_fields(self, *values, **{**absent, **fields})

    kind.__init__ = with_any_names  # type: ignore[method-assign]
    return kind


def _frozen(kind: type[MistralConfig]) -> type[MistralConfig]:
    """Say what to do instead where a field of a frozen dataclass is assigned or deleted."""

    def refuse(self: MistralConfig, name: str, *value: Any) -> None:
        raise FrozenConfigError(
            f"{name}: a MistralConfig is a value and stays as it was made. Make another, config = "
            f"config.replace({name}=...), or let AutoConfig make it: its fields can be assigned."
        )

    kind.__setattr__ = kind.__delattr__ = refuse  # type: ignore[assignment, method-assign]
    return kind


def _as_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments as fields: those under names that only files and transformers have, as a file is read.

    A name that nobody knows is kept in `extra`, as transformers keeps it; raises UnknownFieldError where it is nearly
    that of a field, which it is meant to be.
    """
    if given.keys() <= FIELDS:
        return given
    extra = given.get("extra") or {}
    fields, unknown = dialects.read_arguments({k: v for k, v in given.items() if k != "extra"}, known=FIELDS)
    missed = {name: near for name in sorted(unknown) if (near := near_miss(name, _known_names())) is not None}
    if missed:
        told = ", ".join(f"{name!r} (did you mean {near!r}?)" for name, near in missed.items())
        raise UnknownFieldError(f"MistralConfig has no field {told}; a field of your own must have a name of its own.")
    own = {name: value for name, value in given.items() if name in FIELDS}
    return {**own, **fields, "extra": {**extra, **fields["extra"]}}


def _known_names() -> set[str]:
    """What may be said to a config, and beside it to `from_pretrained`."""
    return {*FIELDS, *arguments.KNOWN, "rope_parameters"}


@_frozen
@_of_any_names
@dataclass(frozen=True)
class MistralConfig:
    """Sizes and numbers of a Mistral, in Hugging Face's names; defaults are those of transformers 4.56.

    `rope_scaling` is None or `{"rope_type": "linear" | "yarn" | "llama3", "factor": ..., ...}`. `sliding_window` is
    the number of keys a position sees, itself included, or None. `layer_types` names each layer full or sliding; None
    makes all sliding where there is a window. `model_type` is one of `model_types.TYPES`, and decides what absent
    fields mean; `ministral3` scales queries by their position, as `llama_4_scaling_beta` in `rope_scaling` says.
    `extra` keeps the keys of a file, and the keyword arguments, that this class does not know, for the way back; they
    are attributes too.

    It is made with fields or with what transformers calls them (`torch_dtype=`, `rope_parameters=`); numbers of NumPy
    and of the frameworks, paths, tuples and ranges are taken as Python's own.

    It is a frozen, hashable value: `replace` makes another one, with all checks. What is assigned to is a view of one
    (`view.AssignableConfig`): a model's `config`, or what AutoConfig makes.
    Raises ConfigError (a ValueError), with all that is wrong at once.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # None becomes hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    sliding_window: int | None = 4096
    attention_dropout: float = 0.0
    layer_types: tuple[str, ...] | None = None
    num_labels: int = 2
    id2label: Mapping[int, str] | None = field(default=None, hash=False)
    label2id: Mapping[str, int] | None = field(default=None, hash=False)
    problem_type: str | None = None
    classifier_dropout: float = 0.1
    dtype: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    architectures: tuple[str, ...] | None = None
    model_type: str = "mistral"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self.__dict__.update(checks.normalised(self))
        checks.check(self)

    @property
    def value(self) -> MistralConfig:
        """This config, frozen: itself, or what a view of it shows."""
        return self

    def program(self, architecture: str) -> MistralConfig:
        """A copy in which all that no compiled program of a class depends on is None.

        Models whose copies are equal share their programs: changing anything else compiles nothing anew.
        """
        names = NO_PROGRAM if architecture == "MistralForSequenceClassification" else (*NO_PROGRAM, *OF_SCORES)
        return self._with(dict.fromkeys(names))

    if not TYPE_CHECKING:  # to a type checker only the fields are attributes

        def __getattr__(self, name: str) -> Any:
            """A key that this class does not know, by its name."""
            extra = vars(self).get("extra", {})
            if name not in extra:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return extra[name]

    # What the models ask

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees everything."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    def problem(self, *, float_labels: bool) -> str:
        """By problem_type; without one, a single label is regression, integers are classes, floats are many classes."""
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if float_labels else "single_label_classification"

    @property
    def torch_dtype(self) -> str | None:
        """`dtype` by its older name."""
        return self.dtype

    # What clients of transformers' configs read

    is_encoder_decoder = False

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What a trainer does not collect of the outputs of an evaluation."""
        return ["past_key_values"]

    def noted(self, **facts: str) -> MistralConfig:
        """A copy that tells its `name_or_path` and `attn_implementation` to those who ask: they are no part of it."""
        return self._with({"_facts": {**self._facts, **facts}})

    _facts: ClassVar[Mapping[str, str]] = {}

    @property
    def name_or_path(self) -> str:
        """Where a model that has this config was loaded from."""
        return self._facts.get("name_or_path", "")

    _name_or_path = name_or_path

    @property
    def _attn_implementation(self) -> str | None:
        """What a model that has this config attends with, by transformers' name."""
        return self._facts.get("attn_implementation")

    def get_text_config(self, **options: Any) -> MistralConfig:
        """Itself, as training libraries ask of models that also see or hear."""
        return self

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` by the name that training libraries read."""
        return self.return_dict

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Theta and scaling in one mapping, as transformers 5 writes them."""
        scaling = dict(self.rope_scaling or {"rope_type": "default"})
        return {"rope_theta": self.rope_theta, **scaling}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, empty if there is none, which transformers' users write as -1 too."""
        if self.eos_token_id in (None, -1):
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self, **changes: Any) -> MistralConfig:
        """A copy with some fields changed and all checks made again.

        Changing `num_labels` or `hidden_size` drops what was derived from the old value.
        """
        if not changes.keys() <= FIELDS:
            changes = _as_fields({"extra": self.extra, **changes})
        if "num_labels" in changes and changes["num_labels"] != self.num_labels:
            changes = {"id2label": None, "label2id": None, **changes}
        return dataclasses.replace(self, **changes)._with({"_facts": self._facts})

    def overridden(self, **changes: Any) -> MistralConfig:
        """As `replace`, with fields that it has and no others: arguments of a call, of which none may be lost.

        Raises UnknownFieldError.
        """
        replaced = self.replace(**changes)
        unknown = sorted(name for name in changes.keys() - FIELDS if name in replaced.extra.keys() - self.extra.keys())
        if unknown:
            told = ", ".join(f"{name!r}{nearest(name, _known_names())}" for name in unknown)
            raise UnknownFieldError(f"MistralConfig has no field {told}; see help(MistralConfig).")
        return replaced

    def _with(self, entries: Mapping[str, Any]) -> MistralConfig:
        """A copy with entries that are not checked."""
        copied = copy.copy(self.value)
        vars(copied).update(entries)
        return copied

    # Files

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, strict: bool = False, where: str = "config") -> MistralConfig:
        """Read a Hugging Face config, of transformers 4 or 5, or a raw `params.json`, whichever `data` is.

        Keys nobody knows are kept in `extra` with one warning; with `strict` they raise UnknownFieldError.
        """
        fields, unknown = read_fields(data, where=where)
        if unknown and strict:
            raise UnknownFieldError(f"{where}: unknown keys {sorted(unknown)}; remove them or pass strict=False.")
        if unknown:
            warn(f"{where}: unknown keys {sorted(unknown)} are kept but not used.")
        return cls(**fields)

    @classmethod
    def of(cls, config: Any) -> MistralConfig:
        """The config that a caller gives: one of this class, transformers' own object, or a dictionary as in a file.

        Another library's object is read by its `to_dict`, as `from_dict` reads a file. Raises ConfigError.
        """
        if isinstance(config, MistralConfig):
            return config.value
        to_dict = getattr(config, "to_dict", None)
        data = to_dict() if callable(to_dict) and not isinstance(config, type) else config
        if not isinstance(data, Mapping) or (data is not config and "model_type" not in data):
            raise ConfigError(
                f"config must be a MistralConfig, transformers' own or a dictionary, got {type(config).__name__}; "
                "MistralConfig.from_pretrained(path) reads a file."
            )
        return cls.from_dict(data)

    @classmethod
    @path_by_either_name
    def from_pretrained(cls, path: str | os.PathLike[str], *, strict: bool = False, **overrides: Any) -> MistralConfig:
        """Read `config.json` or, in a raw checkpoint, `params.json`, from a file, a directory or a hub id.

        `overrides` replace fields; `revision`, `cache_dir`, `token` and `local_files_only` go to the hub.
        Raises CheckpointNotFoundError, ConfigError; where both files are present and disagree, ConfigError names the
        fields.
        """
        hub_arguments = {key: overrides.pop(key) for key in download.ARGUMENTS if key in overrides}
        root = download.resolve(path, files=CONFIG_FILES, **hub_arguments)
        config = reading.of_one_moment(root, lambda held: cls._read(held, strict))
        return config.overridden(**overrides) if overrides else config

    @classmethod
    def _read(cls, root: Path, strict: bool) -> MistralConfig:
        files = [root] if root.is_file() else [root / name for name in CONFIG_FILES if (root / name).exists()]
        if not files:
            text = unread.advice(reading.names(root)) or "check the path"
            raise CheckpointNotFoundError(f"{root}: neither {' nor '.join(CONFIG_FILES)} is there; {text}.")
        configs = []
        for file in files:
            data = strict_json.read_object(file, error=ConfigError)
            configs.append(cls.from_dict(data, strict=strict, where=str(file)))
        if len(configs) == 2:
            checks.check_agree(configs[0], configs[1], where=str(root))
        return configs[0]

    def to_dict(self, *, dialect: str | None = None, with_vision: bool = False) -> dict[str, Any]:
        """The Hugging Face dictionary: `v4` has rope_theta, rope_scaling, torch_dtype; `v5` rope_parameters, dtype.

        None is `v4` for a type that transformers 4 has, else `v5`. `with_vision` gives the config of the model that
        also sees, of which this is the text part. Raises ConfigError where it is not.
        """
        return dialects.write(self, dialect=dialect, with_vision=with_vision)

    def to_json_string(self, *, dialect: str | None = None, with_vision: bool = False) -> str:
        """`to_dict` as the text of a config.json; raises ConfigError for a value of `extra` that JSON has not."""
        data = self.to_dict(dialect=dialect, with_vision=with_vision)
        try:
            return json.dumps(data, indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as cause:
            raise ConfigError(f"config: its own fields and those of `extra` must be JSON; {cause}.") from cause

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json into a directory."""
        into.write_into(directory, {"config.json": self.to_json_string().encode()})


FIELDS = frozenset(field.name for field in dataclasses.fields(MistralConfig))
"""The names of all fields of a MistralConfig."""


def read_fields(data: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of MistralConfig, unknown keys) of a config in any dialect."""
    return dialects.read(data, known=FIELDS, where=where)
