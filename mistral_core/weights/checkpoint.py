"""Checkpoints of Hugging Face safetensors <-> a stream of (canonical name, array), one tensor in memory at a time."""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .. import strict_json
from ..config import MistralConfig
from ..errors import (
    CheckpointIndexError,
    CheckpointNotFoundError,
    ConversionError,
    CorruptCheckpointError,
    DtypeMismatchError,
    LimitExceededError,
    LossyConversionError,
    MissingTensorsError,
    NonFiniteWeightsError,
    ShardMissingError,
    TensorMismatchError,
    UnexpectedTensorsError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from ..parameters import BASE_PREFIX, HEADS, initial_value, parameters, shapes
from . import files, hub, manifest, safetensors_file
from .matching import EMBEDDING, LM_HEAD, match
from .safetensors_file import CODES, DTYPES, SafetensorsFile, TensorInfo, quoted

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


class Checkpoint(NamedTuple):
    """The checked headers of a checkpoint's files."""

    path: Path
    files: Mapping[Path, SafetensorsFile]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: files.PathLike) -> Checkpoint:
        """Open a directory, a `*.safetensors.index.json` or one safetensors file; only headers are read.

        Raises CheckpointNotFoundError, UnsupportedFeatureError (another format), CheckpointIndexError,
        ShardMissingError, UnsafeFileError, LimitExceededError, and what SafetensorsFile raises.
        """
        path = files.as_path(path)
        shards = _open_index(path) if path.name.endswith(".index.json") else None
        if path.is_dir():
            shards = _open_directory(path)
        opened = shards if shards is not None else [SafetensorsFile(path)]
        tensors = {name: info for file in opened for name, info in file.tensors.items()}
        return cls(path, {file.path: file for file in opened}, tensors)

    @property
    def directory(self) -> Path:
        """Where the config and the manifest lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files in one mapping."""
        return {key: value for file in self.files.values() for key, value in file.metadata.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, as stored.

        Raises CorruptCheckpointError if its file changed, DtypeMismatchError if it is no kind of float.
        """
        return self.files[self.tensors[name].file].read(name)


def _open_directory(directory: Path) -> list[SafetensorsFile]:
    single, index = directory / SINGLE, directory / INDEX
    if not single.exists() and not index.exists():
        raise _nothing_to_read(directory)
    if not index.exists():
        return [SafetensorsFile(single)]
    if not single.exists():
        return _open_index(index)
    file = SafetensorsFile(single)
    if set(file.tensors) != set(_weight_map(index)[0]):
        raise CheckpointIndexError(
            f"{directory}: {SINGLE} and {INDEX} name different tensors; remove the stale one."
        )
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


def _weight_map(index: Path) -> tuple[dict[str, str], Any]:
    """The checked weight map of an index and its total_size, if it has one."""
    data = strict_json.read_object(index, error=CheckpointIndexError, max_bytes=MAX_INDEX_BYTES)
    weight_map = data.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise CheckpointIndexError(f"{index}: weight_map, a mapping of tensors to files, was expected.")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointIndexError(
                f"{index}: the file of {quoted(name)} is {type(file).__name__}, not a name."
            )
        files.check_bare_name(file, str(index))
        if not file.endswith(".safetensors"):
            raise UnsafeFileError(
                f"{index}: {quoted(file)} is not safetensors; only safetensors shards are read."
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise LimitExceededError(
            f"{index}: {len(set(weight_map.values()))} shards; at most {MAX_SHARDS} are read."
        )
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _open_index(index: Path) -> list[SafetensorsFile]:
    """Every shard of an index, each holding exactly the tensors mapped to it."""
    weight_map, total_size = _weight_map(index)
    names = sorted(set(weight_map.values()))
    absent = [quoted(name) for name in names if not (index.parent / name).exists()]
    if absent:
        raise ShardMissingError(f"{index}: the shards {', '.join(absent)} are not there; download them.")
    shards = [SafetensorsFile(index.parent / name) for name in names]
    for shard in shards:
        mapped = {name for name, file in weight_map.items() if file == shard.path.name}
        wrong = sorted(quoted(name) for name in mapped ^ set(shard.tensors))
        if wrong:
            raise CheckpointIndexError(
                f"{index}: {shard.path.name} and the index disagree on {', '.join(wrong)}."
            )
    size = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    if total_size is not None and total_size != size:
        # transformers itself wrote this number wrong at times
        warnings.warn(f"{index}: total_size is {total_size}, the shards hold {size} bytes.", stacklevel=4)
    return shards


# Loading


def load(
    path: files.PathLike,
    architecture: str = "MistralForCausalLM",
    *,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    verify: str = "sizes",
    seed: int = 0,
    check_finite: bool = False,
    **hub_arguments: Any,
) -> tuple[MistralConfig, Iterator[tuple[str, np.ndarray]]]:
    """Match a checkpoint to a class; returns the config and a stream of (canonical name, array) in table order.

    All checks are made here, before the stream gives its first tensor. `dtype` casts, None gives what is stored;
    `verify` is a mode of `manifest.verify`; `hub_arguments` are those of `hub.resolve`; `seed` is for a new head.
    Raises CheckpointError and its kinds, ConfigError, HubError.
    """
    if architecture not in HEADS:
        raise UnsupportedFeatureError(
            f"architecture: {architecture!r}, one of {', '.join(HEADS)} was expected."
        )
    target = dtype_of(dtype) if dtype is not None else None
    checkpoint = Checkpoint.open(
        hub.resolve(files.as_path(path) if isinstance(path, bytes) else path, **hub_arguments)
    )
    if config is None:
        config = MistralConfig.from_pretrained(checkpoint.directory)
    manifest.verify(checkpoint.directory, verify)
    where = str(checkpoint.path)
    sources = match(checkpoint.tensors, config, architecture, read=checkpoint.read, where=where)
    if check_finite:
        _check_finite(checkpoint, sources.values())
    return config, _stream(checkpoint, config, architecture, sources, target, seed)


def _stream(
    checkpoint: Checkpoint,
    config: MistralConfig,
    architecture: str,
    sources: Mapping[str, str | None],
    target: np.dtype | None,
    seed: int,
) -> Iterator[tuple[str, np.ndarray]]:
    embedding = sources[EMBEDDING]
    assert embedding is not None  # only heads are initialised
    like = target or DTYPES[checkpoint.tensors[embedding].dtype]
    for name, row in parameters(config, architecture):
        source = sources[name]
        if source is None:
            yield name, cast(initial_value(name, row, config, seed=seed), like, name)
        else:
            array = checkpoint.read(source)
            yield name, array if target is None else cast(array, target, name)


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of weights called `bfloat16`, `float16`, `float32` or `float64`; else DtypeMismatchError."""
    for dtype in DTYPES.values():
        if dtype.name == name:
            return dtype
    raise DtypeMismatchError(
        f"dtype: {name!r}, one of {', '.join(d.name for d in DTYPES.values())} was expected."
    )


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Round an array to the nearest value of a dtype; LossyConversionError where a finite value becomes infinite."""
    if array.dtype == dtype:
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        wide = array.view(np.uint16).astype(np.uint32)  # bfloat16 is the upper half of float32
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max:
        overflown = np.isinf(result) & ~np.isinf(array)
        if overflown.any():
            raise LossyConversionError(
                f"{name}: {overflown.sum()} values are beyond {dtype.name}; load it as bfloat16 or float32."
            )
    return result


def _check_finite(checkpoint: Checkpoint, sources: Iterable[str | None]) -> None:
    """Read everything once and list every tensor with NaN or infinity."""
    bad = []
    for source in sources:
        if source is not None:
            finite = np.isfinite(checkpoint.read(source))
            if not finite.all():
                first = np.unravel_index(int(finite.argmin()), finite.shape)
                bad.append(f"{quoted(source)} first at {[int(i) for i in first]}")
    if bad:
        raise NonFiniteWeightsError(f"{checkpoint.path}: NaN or infinity in {'; '.join(bad)}.")


# Saving


def save(
    directory: files.PathLike,
    config: MistralConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    architecture: str = "MistralForCausalLM",
    dtypes: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    other_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a stream of (canonical name, array), in any order, as a checkpoint that replaces `directory` as a whole.

    Headers are written before the data, so all tensors have the dtype of the first unless `dtypes` names each one's.
    `other_files` (name -> content) go in too, as do the old directory's files that are not weights. Everything is
    read back, compared and listed in a manifest before the swap.
    Raises TensorMismatchError and its kinds, OutputExistsError, OutputBusyError, NoSpaceError, ConversionError.
    """
    if architecture not in HEADS:
        raise UnsupportedFeatureError(
            f"architecture: {architecture!r}, one of {', '.join(HEADS)} was expected."
        )
    limit = shard_bytes(max_shard_size)
    with files.atomic_directory(directory, overwrite=overwrite) as temporary:
        first, stream = _peek(tensors)
        specs = {
            name: (CODES[dtype_of(dtypes[name]) if dtypes else first.dtype], shape)
            for name, shape in shapes(config, architecture).items()
        }
        config = config.replace(architectures=(architecture,), dtype=DTYPES[specs[EMBEDDING][0]].name)
        files.write_file(temporary / "config.json", config.to_json_string().encode())
        for name, content in (other_files or {}).items():
            files.check_bare_name(name, "other_files")
            files.write_file(temporary / name, content)
        infos = _create_shards(temporary, specs, limit, bare=architecture == "MistralModel")
        digests = _write_all(stream, infos, tied=config.tie_word_embeddings)
        description = manifest.describe(temporary)
        for name, info in infos.items():
            if description["tensors"][info.name]["sha256"] != digests[name]:
                raise CorruptCheckpointError(f"{info.file}: {name} reads back differently; check the disk.")
        manifest.store(temporary, description)


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


def _peek(tensors: Iterable[tuple[str, np.ndarray]]) -> tuple[np.ndarray, Iterator[tuple[str, np.ndarray]]]:
    """The first array, and the stream with it."""
    stream = iter(tensors)
    name, first = next(stream, (None, None))
    if name is None or first is None:
        raise MissingTensorsError("save: there is not a single tensor.")
    first = np.asarray(first)
    if first.dtype not in CODES:
        raise DtypeMismatchError(f"{quoted(name)}: {first.dtype}, one of {', '.join(DTYPES)} was expected.")
    return first, itertools.chain([(name, first)], stream)


def _create_shards(
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


def _write_all(
    tensors: Iterable[tuple[str, np.ndarray]], infos: Mapping[str, TensorInfo], *, tied: bool
) -> dict[str, str]:
    """Write each tensor once at its place; canonical name -> digest."""
    digests: dict[str, str] = {}
    unexpected = []
    for name, array in tensors:
        if name in digests:
            raise TensorMismatchError(f"save: {quoted(name)} comes twice.")
        if name in infos:
            digests[name] = safetensors_file.write(infos[name], np.asarray(array))
        elif name == LM_HEAD and tied:
            digests[name] = safetensors_file.digest(np.asarray(array))
        else:
            unexpected.append(quoted(name))
    missing = sorted(set(infos) - set(digests))
    if unexpected:
        raise UnexpectedTensorsError(f"save: the class has no place for {', '.join(sorted(unexpected))}.")
    if missing:
        raise MissingTensorsError(f"save: the tensors {', '.join(missing)} never came.")
    if tied and digests.get(LM_HEAD, digests[EMBEDDING]) != digests[EMBEDDING]:
        raise TensorMismatchError(f"save: tie_word_embeddings is true, but {LM_HEAD} is not the embedding.")
    return digests
