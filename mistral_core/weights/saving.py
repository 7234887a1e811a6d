"""A stream of (canonical name, array) as a checkpoint of safetensors that replaces a directory, whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..config import MistralConfig
from ..disk import files
from ..errors import ConversionError, DtypeMismatchError, MissingTensorsError
from ..generation import GenerationConfig
from ..parameters import parameters
from ..quantization.matrix import PackedMatrix
from ..quantization.storage import Arrangement
from . import manifest
from .containers.shards import shard_bytes
from .containers.tensor_file import CODES, DTYPES, quoted
from .formats.base import Outline
from .loading import GENERATION_FILE, check_architecture, dtype_of
from .writing import write_checkpoint


def save(
    directory: files.PathLike,
    config: MistralConfig,
    tensors: Iterable[tuple[str, np.ndarray | PackedMatrix]],
    *,
    architecture: str = "MistralForCausalLM",
    dtypes: Mapping[str, str] | None = None,
    packed: Mapping[str, Arrangement] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
    other_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a stream of (canonical name, array), in any order, as a checkpoint that replaces `directory`.

    Headers come before the data, so every tensor has the dtype of the first unless `dtypes` (name -> dtype)
    says otherwise, and matrices of few bits are announced in `packed` (name -> arrangement). `other_files` (name ->
    content) go in too, as do the old directory's files that are not weights. All is read back, compared and listed in a
    manifest before the directories are swapped.
    Raises TensorMismatchError and its kinds, OutputExistsError, OutputBusyError, NoSpaceError,
    ConversionError; the old directory is then untouched.
    """
    check_architecture(architecture)
    limit = shard_bytes(max_shard_size)
    with files.atomic_directory(directory, overwrite=overwrite) as temporary:
        dtype, stream = _peek(tensors)
        codes = {name: CODES[dtype_of((dtypes or {}).get(name, dtype))] for name, _ in parameters(config, architecture)}
        _write_others(temporary, other_files or {})
        outline = Outline(config, architecture, codes, packed=packed or {})
        manifest.store(temporary, write_checkpoint(temporary, "hf", outline, stream, limit=limit))


_Stream = Iterator[tuple[str, np.ndarray | PackedMatrix]]


def _peek(tensors: Iterable[tuple[str, np.ndarray | PackedMatrix]]) -> tuple[str, _Stream]:
    """The dtype of the first array, which is no packed matrix, and the whole stream."""
    stream = iter(tensors)
    name, first = next(stream, (None, None))
    if name is None or first is None:
        raise MissingTensorsError("save: there is not a single tensor.")
    if isinstance(first, PackedMatrix):
        raise DtypeMismatchError(f"{quoted(name)} must be floats where it comes first; begin with the embeddings.")
    first = np.asarray(first)
    if first.dtype not in CODES:
        raise DtypeMismatchError(f"{quoted(name)} must be one of {', '.join(DTYPES)}, got {first.dtype}.")
    return first.dtype.name, itertools.chain(iter([(name, first)]), stream)


def _write_others(directory: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        files.check_bare_name(name, "other_files")
        if name == "config.json" or files.is_weights(name):
            raise ConversionError(f"other_files: {name} is written from the config and tensors; leave it out.")
        files.write_file(directory / name, content)


def save_pretrained(
    directory: files.PathLike,
    config: MistralConfig,
    tensors: Iterable[tuple[str, np.ndarray | PackedMatrix]],
    *,
    architecture: str,
    packed: Mapping[str, Arrangement] | None = None,
    generation_config: GenerationConfig,
    max_shard_size: str | int = "5GB",
    overwrite: bool = True,
) -> None:
    """Write config, generation config and tensors as one atomic directory; raises what `save` raises."""
    generation = generation_config.to_json_string()  # a default that is written counts more, to other readers
    save(
        directory,
        config,
        tensors,
        architecture=architecture,
        packed=packed,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        other_files={GENERATION_FILE: generation.encode()},
    )
