"""An adapter's numbers: how they begin, what they make of a matrix, and peft's files of them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..disk import files, strict_json
from ..errors import (
    CheckpointNotFoundError,
    ConfigError,
    MissingTensorsError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnexpectedTensorsError,
    UnsafeFileError,
)
from ..parameters import shape_of
from ..weights.containers import safetensors, tensor_file
from .config import LoraConfig, LoraTarget, module_of

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
"""What peft writes before the model's own names; some writers leave it away."""


ROWS = 1024
"""Rows of a matrix that are folded at once, so that little of it is there in float64."""


class LoraWeights(NamedTuple):
    """What is added to a matrix [O, I]: its scaling times b a."""

    a: Array
    """[r, I] float32."""
    b: Array
    """[O, r] float32."""
    magnitude: Array | None = None
    """[O] float32, the length of each row (DoRA)."""


class Adapter(NamedTuple):
    """An adapter of a model, whole."""

    config: LoraConfig
    weights: Mapping[str, LoraWeights]
    """By the canonical name of the matrix."""
    saved: Mapping[str, Array] = {}
    """Parameters that are saved whole, by their canonical names."""
    base: Mapping[str, Array] = {}
    """Parameters of the base that peft wrote too, as it does where embeddings or the head are adapted."""


# What they make of a matrix


def initial_weights(target: LoraTarget, config: MistralConfig, lora: LoraConfig, *, seed: int = 0) -> LoraWeights:
    """Fresh a and b, whose product is zero unless init_lora_weights is false; of DoRA the magnitude is the base's.

    The numbers depend on `seed` and the name only, so every backend begins with the same ones.
    """
    rows, columns = shape_of(target.row, config)
    random = np.random.Generator(np.random.PCG64([seed, zlib.crc32(target.name.encode()), target.r]))
    is_embedding = target.row.kind == "embedding"
    if is_embedding:  # peft: the table of tokens begins at zero, the other part normal
        a, b = random.standard_normal((target.r, columns), np.float32), np.zeros((rows, target.r), np.float32)
    elif lora.init_lora_weights == "gaussian":
        a = random.standard_normal((target.r, columns), np.float32) / np.float32(target.r)
        b = np.zeros((rows, target.r), np.float32)
    else:
        bound = 1 / np.sqrt(columns)  # Kaiming's, for a slope of sqrt(5)
        a = random.uniform(-bound, bound, (target.r, columns)).astype(np.float32)
        b = np.zeros((rows, target.r), np.float32)
    if lora.init_lora_weights is False:
        bound = 1 / np.sqrt(target.r)
        b = random.uniform(-bound, bound, b.shape).astype(np.float32)
    return LoraWeights(a, b)


def merged(weight: Array, lora: LoraWeights, scaling: float) -> Array:
    """The matrix that computes what a matrix [O, I] and its adapter do, in the wider of their dtypes."""
    changed = weight + scaling * (lora.b @ lora.a)
    if lora.magnitude is None:
        return changed
    return changed * (lora.magnitude / np.linalg.norm(changed, axis=1))[:, None]


def folded(weight: Array, lora: LoraWeights, scaling: float, dtype: np.dtype | None = None) -> Array:
    """`merged` in float64, some rows after another, and rounded once to a dtype, by default that of the matrix.

    All who fold an adapter into a matrix do it here, so that they have the same bits.
    """
    result = np.empty(weight.shape, weight.dtype if dtype is None else dtype)
    a = lora.a.astype(np.float64)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        lengths = None if lora.magnitude is None else lora.magnitude[rows].astype(np.float64)
        part = LoraWeights(a, lora.b[rows].astype(np.float64), lengths)
        result[rows] = merged(weight[rows].astype(np.float64), part, scaling).astype(result.dtype)
    return result


def row_norms(weight: Array) -> Array:
    """[O]: the lengths of rows, with which the magnitude of DoRA begins."""
    found: Array = np.linalg.norm(weight.astype(np.float32), axis=1)
    return found


# Files


def names_of(target: LoraTarget, architecture: str, *, dora: bool = False) -> dict[str, str]:
    """Field of `LoraWeights` -> the name of its tensor in a file, without the prefix."""
    module = module_of(target.name, architecture)
    if target.row.kind == "embedding":
        return {"b": f"{module}.lora_embedding_A", "a": f"{module}.lora_embedding_B"}
    names = {"a": f"{module}.lora_A.weight", "b": f"{module}.lora_B.weight"}
    return {**names, "magnitude": f"{module}.lora_magnitude_vector"} if dora else names


def _shape_in_file(field: str, target: LoraTarget, config: MistralConfig) -> tuple[int, ...]:
    rows, columns = shape_of(target.row, config)
    shape = {"a": (target.r, columns), "b": (rows, target.r), "magnitude": (rows,)}[field]
    return shape[::-1] if target.row.kind == "embedding" else shape


def load(path: str | os.PathLike[str], config: MistralConfig, architecture: str) -> Adapter:
    """Read an adapter for a model from a directory that peft, or `save`, wrote: every tensor is used, none is missing.

    Raises CheckpointNotFoundError, ConfigError, UnsupportedFeatureError, MissingTensorsError, UnexpectedTensorsError,
    ShapeMismatchError, NonFiniteWeightsError, UnsafeFileError for a pickle, and what reading safetensors raises.
    """
    folder = Path(path)
    lora = read_config(folder)
    if not (folder / WEIGHTS_FILE).exists() and (folder / PICKLED_FILE).exists():
        raise UnsafeFileError(
            f"{folder / PICKLED_FILE}: a pickle, which is not read; save the adapter again with "
            "safe_serialization=True."
        )
    file = safetensors.SafetensorsFile(folder / WEIGHTS_FILE)
    stored = {name.removeprefix(PREFIX): name for name in file.tensors}
    wanted: dict[str, tuple[int, ...]] = {}
    targets = lora.targets(config, architecture)
    for target in targets.values():
        for field, name in names_of(target, architecture, dora=lora.use_dora).items():
            wanted[name] = _shape_in_file(field, target, config)
    saved = dict(lora.saved(config, architecture))
    own = {name: f"{module_of(name, architecture)}.{name.rpartition('.')[2]}" for name in saved}
    wanted |= {own[name]: shape_of(row, config) for name, row in saved.items()}
    base = {f"{module_of(name, architecture)}.base_layer.weight": name for name in targets}
    base = {written: name for written, name in base.items() if written in stored}
    wanted |= {written: shape_of(targets[name].row, config) for written, name in base.items()}
    _check(folder / WEIGHTS_FILE, {name: file.tensors[at].shape for name, at in stored.items()}, wanted)

    def read(name: str) -> Array:
        array = file.read(stored[name]).astype(np.float32)
        if not np.isfinite(array).all():
            raise NonFiniteWeightsError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity; take an earlier one.")
        return array

    weights = {}
    for name, target in targets.items():
        found = {field: read(at) for field, at in names_of(target, architecture, dora=lora.use_dora).items()}
        if target.row.kind == "embedding":
            found = {field: np.ascontiguousarray(array.T) for field, array in found.items()}
        weights[name] = LoraWeights(**found)
    return Adapter(
        lora, weights, {name: read(at) for name, at in own.items()}, {name: read(at) for at, name in base.items()}
    )


def read_config(folder: Path) -> LoraConfig:
    """The config of an adapter's directory; raises CheckpointNotFoundError, ConfigError, UnsupportedFeatureError."""
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointNotFoundError(f"{folder}: holds no {CONFIG_FILE}; give the directory of an adapter.")
    return LoraConfig.from_dict(strict_json.read_object(folder / CONFIG_FILE, error=ConfigError))


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter and not a model."""
    folder = Path(path)
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def _check(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise MissingTensorsError(
            f"{path}: {len(missing)} tensors of the adapter are missing ({', '.join(missing[:4])}), and {len(unknown)} "
            f"are there that its config does not mean ({', '.join(unknown[:4]) or 'none'}); it is of another model, or "
            "its config is of another adapter."
        )
    if unknown:
        raise UnexpectedTensorsError(
            f"{path}: {len(unknown)} tensors are none of the adapter ({', '.join(unknown[:4])}); its config must mean "
            "all of them."
        )
    wrong = [name for name, shape in wanted.items() if found[name] != shape]
    if wrong:
        first = wrong[0]
        raise ShapeMismatchError(
            f"{path}: {first} must be {list(wanted[first])}, got {list(found[first])}; the adapter is of a model of "
            "another size, or its config has another r."
        )


def save(directory: str | os.PathLike[str], adapter: Adapter, config: MistralConfig, architecture: str) -> None:
    """Write an adapter as peft does, in one atomic step; what else is in the directory stays.

    Raises ConversionError and its kinds, NonFiniteWeightsError.
    """
    tensors: dict[str, Array] = {}
    for name, target in adapter.config.targets(config, architecture).items():
        for field, written in names_of(target, architecture, dora=adapter.config.use_dora).items():
            array = getattr(adapter.weights[name], field)
            tensors[written] = array.T if target.row.kind == "embedding" else array
    for name, array in adapter.saved.items():
        tensors[f"{module_of(name, architecture)}.{name.rpartition('.')[2]}"] = array
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise NonFiniteWeightsError(f"{name} holds NaN or infinity, and is not written.")
    fields = {**adapter.config.to_dict(), "inference_mode": True}
    with files.atomic_directory(directory, replaces=(CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE)) as temporary:
        text = json.dumps(fields, indent=2, sort_keys=True)
        files.write_file(temporary / CONFIG_FILE, text.encode())
        header = {f"{PREFIX}{name}": ("F32", array.shape) for name, array in tensors.items()}
        for name, info in safetensors.create(temporary / WEIGHTS_FILE, header).items():
            tensor_file.write(info, np.ascontiguousarray(tensors[name.removeprefix(PREFIX)], np.float32))
