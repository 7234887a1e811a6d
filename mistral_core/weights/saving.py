"""What `from_pretrained` and `save_pretrained` of every backend share: config, generation config, tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import MistralConfig
from ..disk import reading
from ..disk.files import PathLike, check_bare_name
from ..generation import GenerationConfig
from ..hub import download
from . import loading as checkpoint
from .containers.tensor_file import DTYPES
from .contents import Checkpoint
from .matching import EMBEDDING, canonical_names
from .sources import resolve_checkpoint

GENERATION_FILE = "generation_config.json"


class Pretrained(NamedTuple):
    """A checkpoint as a class wants it."""

    config: MistralConfig
    """With the overrides, and the dtype the tensors come in."""
    generation_config: GenerationConfig
    tensors: Iterator[tuple[str, np.ndarray]]
    """(canonical name, array), one at a time."""


def load(
    path: PathLike,
    architecture: str,
    *,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    seed: int = 0,
    verify: str = "sizes",
    **options: Any,
) -> Pretrained:
    """Open a checkpoint for a class; `options` are hub arguments, `gguf_file` and fields of the config to replace.

    All tensors come in `dtype`, or in the embedding's own. Raises what `checkpoint.load` raises, and UnknownFieldError.
    """
    config = None if config is None else MistralConfig.taken(config)
    hub_arguments = {key: options.pop(key) for key in download.ARGUMENTS if key in options}
    root = _one_file(path, options.pop("gguf_file", None), hub_arguments)

    def loaded(root: Path) -> Pretrained:
        return _loaded(Checkpoint.open(root, config=config), architecture, config, dtype, seed, verify, options)

    return reading.of_one_moment(root, loaded)


def _loaded(
    opened: Checkpoint,
    architecture: str,
    config: MistralConfig | None,
    dtype: str | None,
    seed: int,
    verify: str,
    options: Mapping[str, Any],
) -> Pretrained:
    """Everything from one opened checkpoint, whose directory is held: config, generation config and tensors agree."""
    directory, config = opened.directory, (config or opened.config).replace(**options)
    embedding = canonical_names(opened.tensors).get(EMBEDDING)
    if dtype is None and embedding is not None and opened.tensors[embedding].dtype in DTYPES:
        dtype = opened.dtype(embedding).name
    config, tensors = checkpoint.load(opened, architecture, config=config, dtype=dtype, seed=seed, verify=verify)
    generation = GenerationConfig.from_model_config(config)
    if (directory / GENERATION_FILE).exists():
        generation = GenerationConfig.from_pretrained(directory)
    return Pretrained(config.replace(dtype=dtype), generation, tensors)


def _one_file(path: PathLike, name: str | None, hub_arguments: dict[str, Any]) -> Path:
    """The directory of a checkpoint, or one file of it: a repository may hold a GGUF of each size."""
    if name is None:
        return resolve_checkpoint(path, **hub_arguments)
    check_bare_name(name, "gguf_file")
    return download.resolve(path, files=(name,), **hub_arguments) / name


def save(
    directory: PathLike,
    config: MistralConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    architecture: str,
    generation_config: GenerationConfig,
    max_shard_size: str | int = "5GB",
    overwrite: bool = True,
) -> None:
    """Write config, generation config and tensors as one atomic directory; raises what `checkpoint.save` raises."""
    generation = generation_config.to_json_string()  # a default that is written counts more, to other readers
    checkpoint.save(
        directory,
        config,
        tensors,
        architecture=architecture,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        other_files={GENERATION_FILE: generation.encode()},
    )
