"""Checkpoints <-> a stream of (canonical name, array), one tensor at a time: reads every format, saves safetensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..config import MistralConfig
from ..disk import files
from ..errors import (
    ConversionError,
    DtypeMismatchError,
    LossyConversionError,
    MissingTensorsError,
    NonFiniteWeightsError,
    UnsupportedFeatureError,
)
from ..parameters import HEADS, initial_value, parameters
from ..telling import warn
from . import casting, manifest
from .containers.shards import shard_bytes
from .containers.tensor_file import CODES, DTYPES, quoted
from .contents import Checkpoint, fits_in_cache
from .formats.base import Outline
from .matching import EMBEDDING, match
from .sources import resolve_checkpoint
from .writing import write_checkpoint

# Loading


def load(
    path: files.PathLike | Checkpoint,
    architecture: str = "MistralForCausalLM",
    *,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    verify: str = "sizes",
    seed: int = 0,
    check_finite: bool = False,
    **hub_arguments: Any,
) -> tuple[MistralConfig, Iterator[tuple[str, np.ndarray]]]:
    """Match a checkpoint, opened or at a path, to a class; gives the config and a stream of (canonical name, array).

    New heads come first, the others in the order of the files, which is the fastest to read.

    All is checked here, before the stream gives its first tensor, except what only values can tell: overflow
    in a cast to `dtype` (None: as stored), and NaN unless `check_finite`, which reads everything once more.
    `verify` is a mode of `manifest.verify`, `seed` is for a new head, `hub_arguments` are `hub.ARGUMENTS`.
    Raises CheckpointError and its kinds, ConfigError, HubError; the stream LossyConversionError.
    """
    _check_architecture(architecture)
    target = dtype_of(dtype) if dtype is not None else None
    checkpoint = path if isinstance(path, Checkpoint) else _open(path, config, hub_arguments)
    config = checkpoint.config if config is None else MistralConfig.taken(config)
    manifest.verify(checkpoint.directory, verify)
    where = str(checkpoint.path)
    if checkpoint.losses:
        warn(f"{where}: {'; '.join(checkpoint.losses)}.")
    sources = match(checkpoint.tensors, config, architecture, read=checkpoint.read, where=where)
    if check_finite:
        _check_finite(checkpoint, sources.values())
    return config, _stream(checkpoint, config, architecture, sources, target, seed)


def _open(path: files.PathLike, config: MistralConfig | None, hub_arguments: dict[str, Any]) -> Checkpoint:
    return Checkpoint.open(resolve_checkpoint(path, **hub_arguments), config=config)


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
    like = target or checkpoint.dtype(embedding)
    for name, row in parameters(config, architecture):
        if sources[name] is None:
            yield name, cast(initial_value(name, row, config, seed=seed), like, name)
    stored = [(source, name) for name, source in sources.items() if source is not None]
    cached = fits_in_cache(sum(checkpoint.tensors[source].nbytes for source, _ in stored))
    for source, name in sorted(stored, key=lambda pair: checkpoint.place(pair[0])):
        # no name for the array: it would keep one tensor too many alive
        yield name, cast(checkpoint.read(source, cached=cached), target or checkpoint.dtype(source), name)


def _check_architecture(name: str) -> None:
    if name not in HEADS:
        raise UnsupportedFeatureError(f"architecture: {name!r}, one of {', '.join(HEADS)} was expected.")


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of `bfloat16`, `float16`, `float32` or `float64`; DtypeMismatchError for others."""
    for dtype in DTYPES.values():
        if dtype.name == name:
            return dtype
    raise DtypeMismatchError(f"dtype: {name!r}, one of {', '.join(d.name for d in DTYPES.values())} was expected.")


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Round an array to the nearest values of a dtype; LossyConversionError where one becomes infinite."""
    if array.dtype == dtype:
        return array
    result = casting.rounded(array, dtype)
    narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max
    overflown = np.count_nonzero(np.isinf(result) & ~np.isinf(array)) if narrower else 0
    if overflown:
        raise LossyConversionError(
            f"{name}: {overflown} values are beyond {dtype.name}; load it as bfloat16 or float32."
        )
    return result


def _check_finite(checkpoint: Checkpoint, sources: Iterable[str | None]) -> None:
    """Read everything once and list every tensor with NaN or infinity."""
    bad = []
    for source in sources:
        if source is not None:
            first = casting.first_not_finite(checkpoint.read(source))
            if first is not None:
                bad.append(f"{quoted(source)} first at {first}")
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
    """Write a stream of (canonical name, array), in any order, as a checkpoint that replaces `directory`.

    Headers come before the data, so every tensor has the dtype of the first unless `dtypes` (name -> dtype)
    says otherwise. `other_files` (name -> content) go in too, as do the old directory's files that are not
    weights. All is read back, compared and listed in a manifest before the directories are swapped.
    Raises TensorMismatchError and its kinds, OutputExistsError, OutputBusyError, NoSpaceError,
    ConversionError; the old directory is then untouched.
    """
    _check_architecture(architecture)
    limit = shard_bytes(max_shard_size)
    with files.atomic_directory(directory, overwrite=overwrite) as temporary:
        dtype, stream = _peek(tensors)
        codes = {name: CODES[dtype_of((dtypes or {}).get(name, dtype))] for name, _ in parameters(config, architecture)}
        _write_others(temporary, other_files or {})
        outline = Outline(config, architecture, codes)
        manifest.store(temporary, write_checkpoint(temporary, "hf", outline, stream, limit=limit))


def _peek(tensors: Iterable[tuple[str, np.ndarray]]) -> tuple[str, Iterator[tuple[str, np.ndarray]]]:
    """The dtype of the first array, and the whole stream."""
    stream = iter(tensors)
    name, first = next(stream, (None, None))
    if name is None or first is None:
        raise MissingTensorsError("save: there is not a single tensor.")
    first = np.asarray(first)
    if first.dtype not in CODES:
        raise DtypeMismatchError(f"{quoted(name)}: {first.dtype}, one of {', '.join(DTYPES)} was expected.")
    return first.dtype.name, itertools.chain(iter([(name, first)]), stream)


def _write_others(directory: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        files.check_bare_name(name, "other_files")
        if name == "config.json" or files.is_weights(name):
            raise ConversionError(f"other_files: {name} is written from the config and tensors; leave it out.")
        files.write_file(directory / name, content)
