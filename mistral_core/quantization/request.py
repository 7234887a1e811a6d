"""What a user asks for: which scheme, in groups of how many columns, and what of the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, UnsupportedFeatureError
from ..parameters import LM_HEAD, parameters, shape_of
from ..plain import is_int
from ..telling import warn
from . import rounding
from .matrix import PackedMatrix
from .storage import Arrangement

if TYPE_CHECKING:
    from ..config import MistralConfig

SCHEMES = ("int8", "int4", "nf4")
GROUPS = {"int8": (), "int4": (128, 64, 32, 16), "nf4": (64, 32, 16)}
"""Group sizes that a scheme takes by itself: the first that divides the columns of every matrix, or a whole row."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the matrices of a model's layers, and its head, are packed; embeddings and norms stay floats."""

    scheme: str
    """int8 | int4 | nf4"""
    group_size: int | None = None
    """Columns that share a scale; -1 is a whole row. None is the scheme's own of `GROUPS`."""
    symmetric: bool = True
    """Of the integers: whether 0 is always the code in the middle; nf4 has no other."""
    head: str | None = None
    """int8: the head too, a scale a row; off: not; None: where the scheme is int4 and the head is not tied."""
    double_quant: bool = False
    """nf4: whether scales are rounded to eight bits themselves."""
    activations: str | None = None
    """int8: rows are rounded to eight bits before they meet int8 or int4 weights; None: they are taken as they are."""

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, SCHEMES)
        _one_of("head", self.head, ("int8", "off", None))
        _one_of("activations", self.activations, ("int8", None))
        size = self.group_size
        if size is not None and size != -1 and not (is_int(size) and 0 < size < 1 << 31):
            raise ConfigError(f"group_size must be a positive integer, -1 or None, got {size!r}.")
        if self.scheme == "nf4":
            if not self.symmetric:
                raise ConfigError("symmetric must be true with nf4, whose values are its own; choose int4.")
            if self.activations is not None:
                raise ConfigError("activations must be None with nf4, whose values are no integers; choose int4.")
            if self.head == "int8":
                raise ConfigError("head must be off with nf4: a file of nf4 holds nothing else packed; choose int4.")
        elif self.double_quant:
            raise ConfigError(f"double_quant must be false with {self.scheme}; scales of nf4 alone are packed again.")

    def resolved(self, config: MistralConfig, architecture: str) -> Quantization:
        """With numbers for None, checked for a model; raises ConfigError with the sizes that would do."""
        tied = config.tie_word_embeddings and architecture == "MistralForCausalLM"
        has_head = not tied and architecture == "MistralForCausalLM"
        if self.head == "int8" and not has_head:
            why = "is tied to the embedding, which stays floats" if tied else "is not that of a language model"
            raise ConfigError(f"head must be off: the head {why}.")
        columns = sorted({shape_of(row, config)[1] for _, row in parameters(config, architecture) if row.is_of_layer})
        size = self.group_size
        if size is None:
            fitting = (group for group in GROUPS[self.scheme] if all(width % group == 0 for width in columns))
            size = next(fitting, -1)
        if size != -1 and any(width % size for width in columns):
            raise ConfigError(
                f"group_size must divide the columns of every matrix, {', '.join(map(str, columns))}, got {size}; "
                f"these do: {', '.join(map(str, _divisors(columns)))}."
            )
        if size != -1 and self.scheme != "int8" and size % 2:
            raise ConfigError(f"group_size must be even with {self.scheme}, got {size}.")
        head = self.head or ("int8" if self.scheme == "int4" and has_head else "off")
        return dataclasses.replace(self, group_size=size, head=head)

    def matrices(self, config: MistralConfig, architecture: str) -> Iterator[str]:
        """Yield the names of the tensors that are packed."""
        for name, row in parameters(config, architecture):
            if row.is_of_layer or (name == LM_HEAD and self.head == "int8"):
                yield name

    def quantise(self, name: str, matrix: np.ndarray) -> PackedMatrix:
        """The nearest codes of a matrix [O, I] of floats; scales come in its dtype, those of nf4 in float32.

        Of a request that is `resolved`. Raises NonFiniteWeightsError.
        """
        kind, group, symmetric = self.of(name, matrix.shape[1])
        scale, zero = rounding.scales(matrix, kind, group, symmetric=symmetric, dtype=matrix.dtype)
        rounding.check_finite(name, scale)
        packed = rounding.nearest(matrix, kind, group, scale, zero)
        if self.double_quant:  # codes are chosen before, as bitsandbytes does it
            packed = packed._replace(scale=rounding.doubled(scale))
        return packed

    def arrangement(self, name: str, shape: tuple[int, int], dtype: str) -> Arrangement:
        """What is known of a packed matrix before there are numbers, of floats of a dtype."""
        kind, group, symmetric = self.of(name, shape[1])
        return Arrangement(kind, shape, (1, group), "float32" if kind == "nf4" else dtype, symmetric)

    def of(self, name: str, columns: int) -> tuple[str, int, bool]:
        """The kind, the columns of a group and the symmetry of one matrix."""
        if name == LM_HEAD:
            return "int8", columns, True
        size = self.group_size
        return self.scheme, columns if size is None or size == -1 else size, self.symmetric


def _divisors(columns: Collection[int]) -> list[int]:
    largest = int(np.gcd.reduce(list(columns)))
    return [size for size in range(8, largest + 1) if largest % size == 0]


def _one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")


# What transformers' users write


@dataclasses.dataclass
class BitsAndBytesConfig:
    """transformers' name for int8 and nf4: which weights are packed, and how; what a kernel computes in has no effect.

    Raises ConfigError for values that mean nothing, UnsupportedFeatureError for those that are not here.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Any = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = None

    def __post_init__(self) -> None:
        of(self)


def of(asked: Any) -> Quantization | None:
    """What `quantization` or `quantization_config` asks for; None for nothing.

    A name of a scheme, a `Quantization`, a dictionary of its fields, a config of transformers or its dictionary. True
    is what the documentation of transformers means by it: 4 bits, nf4. Raises ConfigError, UnsupportedFeatureError.
    """
    if asked is None or isinstance(asked, Quantization):
        return asked
    if asked is True:
        return Quantization("nf4")
    if isinstance(asked, str):
        return Quantization(asked)
    if isinstance(asked, Mapping) and "scheme" in asked:
        return given(asked["scheme"], **asked)
    method, fields = _method(asked)
    if method == "bitsandbytes":
        return _of_bitsandbytes(fields)
    advice = f"its nearest scheme is quantization={_NEAREST[method]!r}" if method in _NEAREST else _CHOICES
    what = repr(method) if method else type(asked).__name__
    raise UnsupportedFeatureError(f"quantization_config of {what} is not made here; {advice}.")


def given(asked: Any, **options: Any) -> Quantization:
    """The same with `options`, fields of `Quantization`, in the place of its own; raises as `of` does."""
    found = of(asked)
    if found is None:
        raise ConfigError(f"{_CHOICES}, got {asked!r}.")
    known = [field.name for field in dataclasses.fields(Quantization)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"quantize takes {', '.join(known)}, got {', '.join(unknown)}; correct the name.")
    return dataclasses.replace(found, **options)


_CHOICES = "quantization must be one of " + ", ".join(map(repr, SCHEMES))
_NEAREST = {
    **dict.fromkeys(("gptq", "awq", "compressed-tensors", "hqq", "torchao", "auto-round"), "int4"),
    **dict.fromkeys(("quanto", "eetq", "fbgemm_fp8", "finegrained_fp8", "fp8"), "int8"),
}
"""A method of transformers -> the scheme that is most like it."""


def _method(asked: Any) -> tuple[str, Mapping[str, Any]]:
    """The name of a method as transformers has it, and the fields of its config."""
    given = asked if isinstance(asked, Mapping) else vars(asked) if hasattr(asked, "__dict__") else {}
    given = {str(key).removeprefix("_"): value for key, value in given.items()}
    if isinstance(asked, BitsAndBytesConfig):
        return "bitsandbytes", given
    method = given.get("quant_method", getattr(asked, "quant_method", ""))
    method = str(getattr(method, "value", method))
    if not method and (given.get("load_in_4bit") or given.get("load_in_8bit")):
        method = "bitsandbytes"
    return method, given


def _of_bitsandbytes(given: Mapping[str, Any]) -> Quantization | None:
    four, eight = bool(given.get("load_in_4bit")), bool(given.get("load_in_8bit"))
    if four and eight:
        raise ConfigError("load_in_4bit and load_in_8bit must not both be true; choose one.")
    if given.get("llm_int8_skip_modules") not in (None, [], ["lm_head"]):
        raise UnsupportedFeatureError("llm_int8_skip_modules must be None or ['lm_head']: all layers are packed alike.")
    if not four:
        return Quantization("int8") if eight else None
    kind = given.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"bnb_4bit_quant_type must be nf4 or fp4, got {kind!r}.")
    if kind == "fp4":
        warn("bnb_4bit_quant_type fp4 is not made here: nf4 is, which is of the same size and loses less.")
    return Quantization("nf4", double_quant=bool(given.get("bnb_4bit_use_double_quant")))
