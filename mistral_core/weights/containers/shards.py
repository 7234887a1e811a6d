"""The files of one checkpoint: a single file of weights, or shards and their index, in the manner of a format."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...disk import files, limits, strict_json
from ...errors import (
    CheckpointIndexError,
    CheckpointNotFoundError,
    ConversionError,
    LimitExceededError,
    ShardMissingError,
    UnsafeFileError,
)
from ...telling import warn
from . import safetensors
from .tensor_file import STORED, UNSEEN, Seen, TensorFile, TensorInfo, quoted

MAX_INDEX_BYTES = limits.MANIFEST_BYTES
MAX_SHARDS = limits.SHARDS

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name in the file -> (dtype code, shape in the file)."""


class Family(NamedTuple):
    """How a format names the files of its weights, and what opens and makes one."""

    single: str
    shard: str
    """With places for the number and the count."""
    index_name: str
    open: Callable[[Path], TensorFile]
    create: Callable[[Path, Specs], dict[str, TensorInfo]]

    @property
    def suffix(self) -> str:
        """What the name of every file ends with."""
        return os.path.splitext(self.single)[1]


def safetensors_family(stem: str, shard: str, *, framework: str) -> Family:
    """Safetensors called `stem`, whose metadata names a framework."""

    def create(path: Path, specs: Specs) -> dict[str, TensorInfo]:
        return safetensors.create(path, specs, framework=framework)

    single = f"{stem}.safetensors"
    return Family(single, shard, f"{single}.index.json", safetensors.SafetensorsFile, create)


HUGGING_FACE = safetensors_family("model", "model-{:05d}-of-{:05d}.safetensors", framework="pt")
SINGLE, INDEX = HUGGING_FACE.single, HUGGING_FACE.index_name

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


def open_files(path: Path, family: Family = HUGGING_FACE, seen: Seen = UNSEEN) -> list[TensorFile]:
    """Check the headers of a directory, of an index and its shards, or of one file, but of those `seen` already."""

    def understood(path: Path) -> TensorFile:
        return seen[path] if path in seen else family.open(path)

    if path.is_dir():
        return _open_directory(path, family._replace(open=understood))
    return _open_index(path, family) if path.name.endswith(".index.json") else [understood(path)]


def _open_directory(directory: Path, family: Family) -> list[TensorFile]:
    """Not a glob: other formats or adapters may lie beside the model."""
    single, index = directory / family.single, directory / family.index_name
    if not single.exists() and not index.exists():
        raise CheckpointNotFoundError(f"{directory}: neither {single.name} nor {index.name} is there; check the path.")
    if not index.exists():
        return [family.open(single)]
    if not single.exists():
        return _open_index(index, family)
    file = family.open(single)
    if set(file.tensors) != set(weight_map_of(index, family.suffix)[0]):
        raise CheckpointIndexError(
            f"{directory}: {single.name} and {index.name} name different tensors; remove the stale one."
        )
    return [file]


def weight_map_of(index: Path, suffix: str = ".safetensors") -> tuple[dict[str, str], Any]:
    """The checked weight map of an index and its total_size, if it has one."""
    data = strict_json.read_object(index, error=CheckpointIndexError, max_bytes=MAX_INDEX_BYTES)
    weight_map = data.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise CheckpointIndexError(f"{index}: weight_map must be a mapping of tensors to files.")
    limits.check(len(weight_map), limits.TENSORS, what="tensors", where=str(index))
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointIndexError(f"{index}: the file of {quoted(name)} is {type(file).__name__}, not a name.")
        files.check_bare_name(file, str(index))
        if not file.endswith(suffix):
            raise UnsafeFileError(f"{index}: {quoted(file)} does not end with {suffix}, as its shards must.")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise LimitExceededError(f"{index}: {len(set(weight_map.values()))} shards; at most {MAX_SHARDS} are read.")
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _open_index(index: Path, family: Family) -> list[TensorFile]:
    """Every shard of an index, each holding exactly the tensors mapped to it."""
    weight_map, total_size = weight_map_of(index, family.suffix)
    names = sorted(set(weight_map.values()))
    absent = [quoted(name) for name in names if not (index.parent / name).exists()]
    if absent:
        raise ShardMissingError(f"{index}: the shards {', '.join(absent)} are not there; download them.")
    shards = [family.open(index.parent / name) for name in names]
    for shard in shards:
        mapped = {name for name, file in weight_map.items() if file == shard.path.name}
        wrong = sorted(quoted(name) for name in mapped ^ set(shard.tensors))
        if wrong:
            raise CheckpointIndexError(f"{index}: {shard.path.name} and the index disagree on {', '.join(wrong)}.")
    size = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    if total_size is not None and total_size != size:
        # transformers itself wrote this number wrong at times
        warn(f"{index}: total_size is {total_size}, the shards hold {size} bytes.")
    return shards


# Writing


def shard_bytes(size: int | str) -> int:
    """Bytes of a shard size such as `"5GB"` (decimal) or `"2GiB"`; ConversionError if it is not one."""
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(size).upper())
    unit = _UNITS.get(number[2] or "") if number else None
    if number is None or unit is None or float(number[1]) * unit < 1:
        raise ConversionError(f"max_shard_size must be a positive size such as '5GB', got {size!r}.")
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


def create_shards(directory: Path, specs: Specs, limit: int, family: Family = HUGGING_FACE) -> dict[str, TensorInfo]:
    """Reserve every shard and write their index; name in the file -> where the tensor goes."""
    sizes = {name: math.prod(shape) * STORED[code].itemsize for name, (code, shape) in specs.items()}
    files.require_space(directory, sum(sizes.values()))
    shards = split(sizes, limit)
    infos: dict[str, TensorInfo] = {}
    for number, names in enumerate(shards, 1):
        file = family.single if len(shards) == 1 else family.shard.format(number, len(shards))
        infos |= family.create(directory / file, {name: specs[name] for name in names})
    if len(shards) > 1:
        parameter_count = sum(math.prod(shape) for _, shape in specs.values())
        index = {
            "metadata": {"total_parameters": parameter_count, "total_size": sum(sizes.values())},
            "weight_map": {name: info.file.name for name, info in infos.items()},
        }
        files.write_file(directory / family.index_name, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    return infos
