"""The files of one checkpoint: a single safetensors file, or shards and their index."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import strict_json
from ..errors import (
    CheckpointIndexError,
    CheckpointNotFoundError,
    ConversionError,
    LimitExceededError,
    ShardMissingError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from ..parameters import BASE_PREFIX
from . import files, safetensors_file
from .safetensors_file import DTYPES, SafetensorsFile, TensorInfo, quoted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 10 << 20
MAX_SHARDS = 1000

_FOREIGN = {
    "consolidated": "a raw Mistral checkpoint",
    "pytorch_model": "a PyTorch pickle, which is never unpickled",
    ".pth": "a PyTorch pickle, which is never unpickled",
    ".bin": "a PyTorch pickle, which is never unpickled",
    ".h5": "a TensorFlow or Keras checkpoint",
    ".keras": "a Keras model",
    ".msgpack": "a Flax checkpoint",
    ".gguf": "a GGUF file",
}
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def open_files(path: Path) -> list[SafetensorsFile]:
    """Check the headers of a directory, of an index and its shards, or of one file."""
    if os.path.isdir(path):
        return _open_directory(path)
    return _open_index(path) if path.name.endswith(".index.json") else [SafetensorsFile(path)]


def _open_directory(directory: Path) -> list[SafetensorsFile]:
    """Not a glob: raw `consolidated.safetensors` or adapters may lie beside the model."""
    single, index = directory / SINGLE, directory / INDEX
    if not single.exists() and not index.exists():
        raise _nothing_to_read(directory)
    if not index.exists():
        return [SafetensorsFile(single)]
    if not single.exists():
        return _open_index(index)
    file = SafetensorsFile(single)
    if set(file.tensors) != set(weight_map_of(index)[0]):
        raise CheckpointIndexError(f"{directory}: {SINGLE} and {INDEX} name different tensors; remove the stale one.")
    return [file]


def _nothing_to_read(directory: Path) -> Exception:
    """The error for a directory without safetensors, naming the foreign format if there is one."""
    for name in sorted(entry.name for entry in directory.iterdir()):
        for mark, what in _FOREIGN.items():
            if name.endswith(mark) if mark.startswith(".") else name.startswith(mark):
                return UnsupportedFeatureError(
                    f"{directory}: {quoted(name)} is {what}; only Hugging Face safetensors is read so far."
                )
    return CheckpointNotFoundError(f"{directory}: neither {SINGLE} nor {INDEX} is there; check the path.")


def weight_map_of(index: Path) -> tuple[dict[str, str], Any]:
    """The checked weight map of an index and its total_size, if it has one."""
    data = strict_json.read_object(index, error=CheckpointIndexError, max_bytes=MAX_INDEX_BYTES)
    weight_map = data.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise CheckpointIndexError(f"{index}: weight_map, a mapping of tensors to files, was expected.")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointIndexError(f"{index}: the file of {quoted(name)} is {type(file).__name__}, not a name.")
        files.check_bare_name(file, str(index))
        if not file.endswith(".safetensors"):
            raise UnsafeFileError(f"{index}: {quoted(file)} is not safetensors; only safetensors shards are read.")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise LimitExceededError(f"{index}: {len(set(weight_map.values()))} shards; at most {MAX_SHARDS} are read.")
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _open_index(index: Path) -> list[SafetensorsFile]:
    """Every shard of an index, each holding exactly the tensors mapped to it."""
    weight_map, total_size = weight_map_of(index)
    names = sorted(set(weight_map.values()))
    absent = [quoted(name) for name in names if not (index.parent / name).exists()]
    if absent:
        raise ShardMissingError(f"{index}: the shards {', '.join(absent)} are not there; download them.")
    shards = [SafetensorsFile(index.parent / name) for name in names]
    for shard in shards:
        mapped = {name for name, file in weight_map.items() if file == shard.path.name}
        wrong = sorted(quoted(name) for name in mapped ^ set(shard.tensors))
        if wrong:
            raise CheckpointIndexError(f"{index}: {shard.path.name} and the index disagree on {', '.join(wrong)}.")
    size = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    if total_size is not None and total_size != size:
        # transformers itself wrote this number wrong at times
        warnings.warn(f"{index}: total_size is {total_size}, the shards hold {size} bytes.", stacklevel=4)
    return shards


# Writing


def shard_bytes(size: int | str) -> int:
    """Bytes of a shard size such as `"5GB"` (decimal) or `"2GiB"`; ConversionError if it is not one."""
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(size).upper())
    unit = _UNITS.get(number[2] or "") if number else None
    if number is None or unit is None or float(number[1]) * unit < 1:
        raise ConversionError(f"max_shard_size: {size!r}, a positive size such as '5GB' was expected.")
    return int(float(number[1]) * unit)


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in shards, greedily and in order; a tensor beyond the limit is a shard of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if used + size > limit:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += size
    return [*shards, current] if current else shards


def create_shards(
    directory: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], limit: int, *, bare: bool
) -> dict[str, TensorInfo]:
    """Reserve every shard and write their index; canonical name -> where the tensor goes."""
    sizes = {name: math.prod(shape) * DTYPES[code].itemsize for name, (code, shape) in specs.items()}
    files.require_space(directory, sum(sizes.values()))
    stored = {name: name.removeprefix(BASE_PREFIX) if bare else name for name in specs}
    shards = split(sizes, limit)
    infos: dict[str, TensorInfo] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        created = safetensors_file.create(directory / file, {stored[name]: specs[name] for name in names})
        infos |= {name: created[stored[name]] for name in names}
    if len(shards) > 1:
        parameter_count = sum(math.prod(shape) for _, shape in specs.values())
        index = {
            "metadata": {"total_parameters": parameter_count, "total_size": sum(sizes.values())},
            "weight_map": {stored[name]: info.file.name for name, info in infos.items()},
        }
        files.write_file(directory / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return infos
