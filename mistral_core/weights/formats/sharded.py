"""Hugging Face safetensors: the table's own names and layout, in one file or in shards with an index."""

from __future__ import annotations

from pathlib import Path

from ...compat import unread
from ...config import MistralConfig
from ...errors import UnsupportedFeatureError
from ...parameters import BASE_PREFIX
from ...quantization import schemes
from .. import dequantised
from ..containers.shards import create_shards, open_files
from ..containers.tensor_file import TensorFile
from ..opened import Checkpoint, stored_as_it_is
from . import base
from .base import Outline, Target


def open(path: Path, config: MistralConfig | None) -> Checkpoint:
    """Understand the headers; names stay those of the files."""
    return from_shards(path, "hf", open_files(path), config)


def from_shards(path: Path, format: str, shards: list[TensorFile], config: MistralConfig | None) -> Checkpoint:
    """The checkpoint of opened files with Hugging Face's names."""
    directory = path if path.is_dir() else path.parent
    if unread.is_mlx({name for shard in shards for name in shard.tensors}):
        raise UnsupportedFeatureError(
            f"{path}: packed by MLX (scales and biases beside the weights), which is not read; write it with "
            "mlx_lm.convert --dequantize."
        )
    views = dequantised.dequantised(shards, directory / "config.json", "quantization_config", schemes.read, config)
    return Checkpoint(
        path,
        format,
        {shard.path: shard for shard in shards},
        dequantised.labelled(stored_as_it_is(views), views),
        base.opened_config(path, config),
        base.texts_in(directory),
    )


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors; a bare model's names lack `model.`."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    bare = outline.architecture == "MistralModel"
    names = {name: name.removeprefix(BASE_PREFIX) if bare else name for name in outline.rows()}
    infos = create_shards(directory, base.specs_in_layout(outline, names), limit)
    return base.targets_in_layout(infos, outline, names)
