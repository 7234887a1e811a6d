"""What an adapter is: the fields of peft's `adapter_config.json`, and which matrices of a model they mean.

Names, defaults and rules are peft's (0.21.2). A field of which nothing here knows is passed over where it says nothing,
and refused where it would change what is computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..config import MistralConfig
from ..disk.limits import ADAPTER_REPEATS
from ..errors import ConfigError, UnsupportedFeatureError
from ..parameters import BASE_PREFIX, HEADS, Parameter, parameters
from ..plain import is_int, is_number
from ..telling import nearest, shown

PEFT_VERSION = "0.21.2"
"""The version of peft whose format is written."""
ALL_LINEAR = "all-linear"
"""Every matrix but the head; a classifier's head is saved whole beside the adapter."""
USUAL_TARGETS = ("q_proj", "v_proj")
"""What is adapted where nothing is said, as peft has it for Mistral."""
TASKS = {
    "MistralForCausalLM": "CAUSAL_LM",
    "MistralForSequenceClassification": "SEQ_CLS",
    "MistralForTokenClassification": "TOKEN_CLS",
    "MistralForQuestionAnswering": "QUESTION_ANS",
    "MistralModel": "FEATURE_EXTRACTION",
}
"""Class name -> what peft calls its task."""

TASK_OF = {task: name for name, task in TASKS.items()}
"""The same the other way round."""

INITIAL = (True, False, "gaussian")
"""How A and B may begin: A uniform and B zero; both random; A normal and B zero. As stored they are plain LoRA."""
_OTHER_BASE = "it was trained on changed base weights; convert it with peft's path_initial_model_for_weight_conversion"
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (None, "activated LoRA is not computed here"),
    "arrow_config": (None, "routed adapters are not computed here"),
    "auto_mapping": (None, ""),
    "corda_config": (None, _OTHER_BASE),
    "eva_config": (None, ""),
    "kasa_config": (None, "its arithmetic is not LoRA's"),
    "layer_replication": (None, "copied layers are another model"),
    "loftq_config": (None, _OTHER_BASE),
    "lora_bias": (False, "Mistral's matrices have no bias to merge one into"),
    "lora_ga_config": (None, _OTHER_BASE),
    "megatron_config": (None, "it is for Megatron's own layers"),
    "megatron_core": ("megatron.core", ""),
    "monteclora_config": (None, "its arithmetic is not LoRA's"),
    "qalora_group_size": (16, ""),
    "target_parameters": (None, "a dense Mistral has modules alone; give target_modules"),
    "trainable_token_indices": (None, "give modules_to_save=['embed_tokens'] instead"),
    "use_bdlora": (None, "its arithmetic is not LoRA's"),
    "use_qalora": (False, "its arithmetic is not LoRA's"),
    "velora_config": (None, "its arithmetic is not LoRA's"),
}
"""Field -> the value that is written, and says nothing; why others are refused, or nothing where they do no harm."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter of low rank: which matrices it changes, of what rank, and how it is scaled and trained."""

    r: int = 8
    lora_alpha: float = 8
    """What the product is multiplied by, over r, or over sqrt(r) with `use_rslora`."""
    target_modules: str | tuple[str, ...] | None = None
    """Ends of module names, or one regular expression of whole names, or all-linear; None: q_proj and v_proj."""
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    """The layers whose modules are meant; None: all."""
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Regular expression of the end of a module's name -> its own r."""
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0
    """The share of inputs of A that are dropped in training."""
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained and saved whole, beside the adapter."""
    bias: str = "none"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False

    def __hash__(self) -> int:
        return hash((self.r, self.lora_alpha, self.target_modules))  # the patterns are dictionaries

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list | set | frozenset):
                value = tuple(value) if isinstance(value, list) else tuple(sorted(value))
                object.__setattr__(self, name, value)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not is_int(rank) or rank <= 0:
                raise ConfigError(f"{name} must be a positive integer, got {shown(rank)}.")
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": x for k, x in self.alpha_pattern.items()}}
        for name, alpha in alphas.items():
            if not is_number(alpha) or not math.isfinite(alpha):
                raise ConfigError(f"{name} must be a finite number, got {shown(alpha)}.")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be from 0 to below 1, got {shown(self.lora_dropout)}.")
        if self.init_lora_weights not in INITIAL and self.init_lora_weights not in ("orthogonal", "eva"):
            raise UnsupportedFeatureError(f"init_lora_weights={shown(self.init_lora_weights)}: {_OTHER_BASE}.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f"bias must be none, all or lora_only, got {shown(self.bias)}.")
        if self.fan_in_fan_out:
            raise UnsupportedFeatureError("fan_in_fan_out: Mistral's matrices are [out, in]; leave it out.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform goes with a list of target_modules; a pattern names layers itself.")
        for pattern in (self.target_modules, self.exclude_modules, *self.rank_pattern, *self.alpha_pattern):
            if isinstance(pattern, str):
                _check_pattern(pattern)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LoraConfig:
        """The config of a file's fields; raises ConfigError, and UnsupportedFeatureError for what changes a result."""
        kind = fields.get("peft_type", "LORA")
        if kind != "LORA":
            raise UnsupportedFeatureError(f"peft_type: {shown(kind)}; adapters of the type LORA are read.")
        own = {field.name for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name in own or name in ("peft_type", "peft_version"):
                continue
            neutral, why = _REFUSED.get(name, (None, "nothing here knows it; train the adapter without it"))
            if (
                value not in (neutral, None, False, "")
                and value != {}
                and value != []
                and (why or name not in _REFUSED)
            ):
                raise UnsupportedFeatureError(f"{name}={shown(value)}: {why}{nearest(name, own)}.")
        given = {name: value for name, value in fields.items() if name in own}
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given.get(name) or {}
            if not isinstance(given[name], Mapping):
                raise ConfigError(f"{name} must be an object, got {shown(given[name])}.")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """All fields as peft writes them."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        neutral = {name: value for name, (value, _) in _REFUSED.items()}
        neutral["loftq_config"] = {}
        return {**neutral, **lists, "peft_type": "LORA", "peft_version": PEFT_VERSION}

    def for_model(self, config: MistralConfig, architecture: str) -> LoraConfig:
        """With what `None` and all-linear mean for a model written out; raises ConfigError where nothing is meant."""
        found = self
        if found.target_modules is None:
            found = dataclasses.replace(found, target_modules=USUAL_TARGETS)
        elif found.target_modules == ALL_LINEAR:
            every = [module_of(name, architecture) for name, row in parameters(config, architecture) if row.is_of_layer]
            head = tuple({name.partition(".")[0] for row in HEADS[architecture] for name in [row.name]} - {"lm_head"})
            saved = found.modules_to_save or head or None
            found = dataclasses.replace(found, target_modules=tuple(sorted(every)), modules_to_save=saved)
        if found.task_type is None:
            found = dataclasses.replace(found, task_type=TASKS[architecture])
        found.targets(config, architecture)
        return found

    def targets(self, config: MistralConfig, architecture: str) -> dict[str, LoraTarget]:
        """Canonical name of a matrix -> how it is adapted, in table order; raises ConfigError where none is meant."""
        found = {}
        for name, row in _modules(config, architecture):
            module = module_of(name, architecture)
            if self._means(module):
                found[name] = LoraTarget(name, row, self._number("rank", module), self._scaling(module))
        if not found:
            raise ConfigError(
                f"target_modules must name matrices of the model, got {shown(self.target_modules)}; the ends of names "
                "are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens and lm_head."
            )
        dora = [each for each in found.values() if self.use_dora and each.row.kind == "embedding"]
        if dora:
            raise UnsupportedFeatureError("use_dora: not of embed_tokens; leave it out of target_modules.")
        return found

    def saved(self, config: MistralConfig, architecture: str) -> list[tuple[str, Parameter]]:
        """(canonical name, row) of what is saved whole; raises ConfigError for a module that the model has not."""
        wanted = self.modules_to_save or ()
        rows = [(name, row, module_of(name, architecture)) for name, row in parameters(config, architecture)]
        missing = [each for each in wanted if not any(_matches((each,), module) for _, _, module in rows)]
        if missing:
            raise ConfigError(f"modules_to_save must name modules of the model, got {', '.join(map(repr, missing))}.")
        return [(name, row) for name, row, module in rows if _matches(wanted, module)]

    def _means(self, module: str) -> bool:
        """Whether a module is meant, by peft's rules."""
        if _matches(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or ()):
            return False
        targets = USUAL_TARGETS if self.target_modules is None else self.target_modules
        if not _matches(targets, module):
            return False
        layers = self.layers_to_transform
        if isinstance(targets, str) or module in targets or layers is None or layers == ():
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        ways = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.?[^.]*\.(\d+)\."]
        index = next((int(hit[1]) for way in ways if (hit := re.match(way, module))), None)
        return index in ((layers,) if isinstance(layers, int) else layers)

    def _number(self, kind: str, module: str) -> Any:
        pattern, usual = {
            "rank": (self.rank_pattern, self.r), "alpha": (self.alpha_pattern, self.lora_alpha),
        }[kind]  # fmt: skip
        return next((x for key, x in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), usual)

    def _scaling(self, module: str) -> float:
        rank = self._number("rank", module)
        return float(self._number("alpha", module) / (math.sqrt(rank) if self.use_rslora else rank))


class LoraTarget(NamedTuple):
    """A matrix that an adapter changes."""

    name: str
    """Canonical."""
    row: Parameter
    r: int
    scaling: float


def _check_pattern(pattern: str) -> None:
    """Raise ConfigError for what is no regular expression, or one that a stranger could make run for years."""
    try:
        re.compile(pattern)
    except re.error as cause:
        raise ConfigError(f"{shown(pattern)} must be a regular expression: {cause}.") from cause
    if len(re.findall(r"[*+{]", pattern)) > ADAPTER_REPEATS or re.search(r"\([^()]*[*+][^()]*\)[*+{]", pattern):
        raise ConfigError(
            f"{shown(pattern)}: a regular expression that repeats more than {ADAPTER_REPEATS} parts, or repetitions, "
            "may take for ever; give a list of names."
        )


def module_of(name: str, architecture: str) -> str:
    """The name of the module that holds a parameter, as the model's class has it."""
    module = name.rpartition(".")[0]
    return module.removeprefix(BASE_PREFIX) if architecture == "MistralModel" else module


def _modules(config: MistralConfig, architecture: str) -> Iterator[tuple[str, Parameter]]:
    """(canonical name, row) of every matrix that can be adapted; of a tied head there is none of its own."""
    for name, row in parameters(config, architecture):
        if len(row.axes) == 2:
            yield name, row


def _matches(wanted: str | tuple[str, ...] | None, module: str) -> bool:
    if wanted is None:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == each or module.endswith(f".{each}") for each in wanted)
