"""What is planned: a model cut over a mesh, what is done with it, and the tensors that one device holds of it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import MistralConfig
from ..errors import ConfigError, InputError, MeshError
from ..generation.cache_layout import cache_dtype
from ..parameters import BODY, Parameter, axis_sizes, head_of, shape_of
from ..plain import dtype_name, is_int
from ..quantization import request
from ..quantization.matrix import KINDS
from ..quantization.storage import Arrangement
from ..sharding import Rules, Sharding

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""What parameters may be kept in -> bytes of a number."""
FLOAT = DTYPES["float32"]
SPELLINGS = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
"""What dtypes are called elsewhere -> here."""
OPTIMIZERS = {"none": 0, "adamw": 2, "lion": 1, "sgd": 0}
"""How many moments an optimizer keeps of each number that trains: AdamW (arXiv 1711.05101) two, Lion (2302.06675) one,
SGD without momentum none. `none` is inference."""
WHOLE_SIZES = (128, 64, 32, 16)
"""Group sizes that are offered where a mesh cuts a larger group."""


class Held(NamedTuple):
    """Equal tensors of a model, one in each layer or one alone."""

    row: Parameter
    times: int
    size: int
    """Bytes of a number, where it is a float."""
    trains: bool
    """Whether it has a gradient and moments."""
    packed: Arrangement | None = None

    @property
    def is_of_layer(self) -> bool:
        """Whether each layer has one."""
        return "{}" in self.row.name


@dataclass(frozen=True)
class Workload:
    """A model on a mesh, and a step of training it or of generating text with it; made and checked by `of`."""

    sharding: Sharding
    architecture: str
    dtype: str
    batch: int
    """Rows of the whole batch, of all devices."""
    sequence: int
    """Tokens of a row; in inference those of the prompt and the answer together."""
    optimizer: str
    master: str | None
    lora: int | None
    quantization: request.Quantization | None
    remat: bool
    cache_dtype: str

    @classmethod
    def of(
        cls,
        config: MistralConfig,
        mesh: Mapping[str, int],
        *,
        rules: Rules | None = None,
        architecture: str = "MistralForCausalLM",
        dtype: Any = "bfloat16",
        batch: int = 1,
        sequence: int = 4096,
        optimizer: str = "none",
        master: Any = None,
        lora: int | None = None,
        quantization: Any = None,
        remat: bool = False,
        cache_dtype: Any = None,
    ) -> Workload:
        """What is to be planned; the arguments are those of `plan.plan`.

        Raises MeshError where the mesh cannot cut the model or would cut a group of packed columns, ConfigError and
        InputError for an argument that means nothing or contradicts another.
        """
        _one_of("optimizer", optimizer, OPTIMIZERS)
        for name, value in (("batch", batch), ("sequence", sequence), ("lora", 1 if lora is None else lora)):
            if not is_int(value) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}; correct it.")
        asked = request.of(quantization)
        work = cls(
            Sharding.of(config, mesh, rules), architecture, dtype_of(dtype), batch, sequence, optimizer,
            None if master is None else dtype_of(master, name="master"), lora,
            None if asked is None else asked.resolved(config, architecture), remat,
            dtype_of(dtype) if cache_dtype is None else _cache_dtype(cache_dtype),
        )  # fmt: skip
        work._check(cache_dtype)
        return work

    @property
    def config(self) -> MistralConfig:
        """The config of the model."""
        return self.sharding.config

    @property
    def trains(self) -> bool:
        """Whether there are gradients."""
        return self.optimizer != "none"

    @property
    def has_logits(self) -> bool:
        """Whether there is a number for each token of the vocabulary."""
        return self.architecture == "MistralForCausalLM"

    @property
    def rows(self) -> int:
        """Rows of the batch that one device computes: all of them where its parts do not divide them."""
        return self.batch // self.devices(self.batch_axes)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that cut the batch."""
        (axes,) = self.sharding.activation("B", {"B": self.batch})
        return self.larger_than_one(axes)

    def axes(self, letter: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that cut a letter."""
        return self.larger_than_one(self.sharding.rules.get(letter, ()))

    def larger_than_one(self, axes: Collection[str]) -> tuple[str, ...]:
        """Those of some mesh axes that have more than one device."""
        return tuple(axis for axis in axes if self.sharding.mesh[axis] > 1)

    def devices(self, axes: Collection[str]) -> int:
        """How many devices some mesh axes span."""
        return math.prod(self.sharding.mesh[axis] for axis in axes)

    @functools.cached_property
    def tensors(self) -> tuple[Held, ...]:
        """All that the model owns, and its adapters, in the order of the table."""
        return tuple(self._tensors())

    def _tensors(self) -> Iterator[Held]:
        config, size = self.config, DTYPES[self.dtype]
        packed = set() if self.quantization is None else set(self.quantization.matrices(config, self.architecture))
        for row in (*BODY, *head_of(config, self.architecture)):
            name, times = row.name.format(0), config.num_hidden_layers if "{}" in row.name else 1
            arrangement = None
            if self.quantization is not None and name in packed:
                rows, columns = shape_of(row, config)
                arrangement = self.quantization.arrangement(name, (rows, columns), self.dtype)
            yield Held(row, times, size, self.trains and self.lora is None, arrangement)
            if self.lora is not None and row.is_of_layer:
                base, (out, into) = row.name.removesuffix("weight"), row.axes
                for part, axes in (("lora_A", ("R", into)), ("lora_B", (out, "R"))):
                    yield Held(Parameter(f"{base}{part}.weight", axes, row.kind), times, FLOAT, self.trains)

    def shape(self, held: Held, *, gathered: bool = False) -> tuple[int, ...]:
        """The shape of one tensor on a device; `gathered` from all devices that share out the hidden size D."""
        sizes, shape = axis_sizes(self.config) | {"R": self.lora or 0}, []
        for axis, axes in zip(held.row.axes, self.sharding.parameter(held.row), strict=True):
            parts = 1 if gathered and axis[0] == "D" else self.devices(axes)
            shape.append(math.prod(sizes[letter] for letter in axis) // parts)
        return tuple(shape)

    def gathered_over(self, held: Held) -> tuple[str, ...]:
        """The mesh axes that cut the hidden size D of a tensor."""
        spec = self.sharding.parameter(held.row)
        return tuple(
            axis
            for letters, axes in zip(held.row.axes, spec, strict=True)
            if letters[0] == "D"
            for axis in self.larger_than_one(axes)
        )

    def nbytes(self, held: Held, *, gathered: bool = False) -> int:
        """Bytes of one tensor on a device, of its codes and scales if it is packed.

        The only scale of a row stands on every device that has a part of the row.
        """
        shape = self.shape(held, gathered=gathered)
        if held.packed is None:
            return math.prod(shape) * held.size
        (rows, columns), group = shape, _group(held.packed)
        codes = math.ceil(columns * KINDS[held.packed.kind].bits / 8)
        scales = 1 if group is None else columns // group
        return rows * (codes + scales * np.dtype(held.packed.scale).itemsize)

    def _check(self, cache_dtype: Any) -> None:
        if self.quantization is not None and self.trains and self.lora is None:
            raise ConfigError(
                f"quantization must be None where all parameters train, got {self.quantization.scheme}; train adapters "
                "beside the packed matrices with lora=16."
            )
        if self.master not in (None, "float32"):
            raise ConfigError(f"master must be None or float32, got {self.master}; leave it out.")
        if not self.trains:
            for name, value in (("remat", self.remat), ("master", self.master)):
                if value:
                    raise ConfigError(f"{name} must not be given in inference, got {value}; give an optimizer.")
        elif cache_dtype is not None:
            raise ConfigError(f"cache_dtype must not be given in training, got {cache_dtype}; leave it out.")
        for held in self.tensors:
            if held.packed is not None:
                self._check_groups(held, held.packed)

    def _check_groups(self, held: Held, packed: Arrangement) -> None:
        """Raise MeshError where a device would hold a part of a group, or of a byte of two codes."""
        columns, group = self.shape(held)[1], _group(packed)
        unit = group or 8 // KINDS[packed.kind].bits
        if columns < packed.shape[1] and columns % unit:
            fitting = [str(size) for size in WHOLE_SIZES if columns % size == 0]
            advice = f"a group_size of {', '.join(fitting)} fits" if fitting else "choose a mesh of fewer parts"
            raise MeshError(
                f"mesh must not cut a group of packed columns, got {columns} columns of {held.row.name.format(0)} a "
                f"device in groups of {unit}; {advice}."
            )


def _group(packed: Arrangement) -> int | None:
    """Columns that share a scale; None where a whole row does."""
    return None if packed.block[1] >= packed.shape[1] else packed.block[1]


def dtype_of(given: Any, *, name: str = "dtype") -> str:
    """The name of a dtype of parameters, of its short spelling (bf16), or of any framework's; raises ConfigError."""
    found = str(dtype_name(given)).lower()
    found = SPELLINGS.get(found, found)
    if found not in DTYPES:
        raise ConfigError(f"{name} must be one of {', '.join((*DTYPES, *SPELLINGS))}, got {given!r}; choose one.")
    return found


def _cache_dtype(given: Any) -> str:
    name = str(dtype_name(given)).lower()
    return cache_dtype(SPELLINGS.get(name, name))


def mesh_of(text: str) -> dict[str, int]:
    """A mesh from its text, `data=4,tensor=8`; an empty text is one device. Raises MeshError."""
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    found = [re.fullmatch(r"(\w+)=(\d{1,6})", pair) for pair in pairs]
    mesh = {match[1]: int(match[2]) for match in found if match is not None}
    if len(mesh) < len(pairs) or 0 in mesh.values():
        raise MeshError(
            f"mesh must be axes with sizes of at least 1, each once, got {text!r}; write it as data=4,tensor=8."
        )
    return mesh


def _one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}; choose one.")
