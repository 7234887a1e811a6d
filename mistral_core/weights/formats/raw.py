"""Raw Mistral: consolidated.safetensors and params.json, rotary rows in interleaved pairs."""

from __future__ import annotations

import json
from pathlib import Path

from ...config import MistralConfig, dialects, read_fields
from ...disk import files, strict_json
from ...errors import ConfigError
from ...parameters import layer_of, parameters
from ...quantization import schemes
from .. import carried, dequantised, layouts
from ..containers.shards import create_shards, open_files, safetensors_family
from ..containers.tensor_file import TensorFile
from ..opened import Checkpoint, stored_in_layout
from . import base
from .base import Outline, Target

PARAMS = "params.json"
FAMILY = safetensors_family("consolidated", "consolidated-{:05d}-of-{:05d}.safetensors", framework="pt")
LAYOUT = layouts.rotary_pairs


def open(path: Path, config: MistralConfig | None) -> Checkpoint:
    """Understand the headers."""
    return from_shards(path, "raw", open_files(path, FAMILY), config)


def from_shards(path: Path, format: str, shards: list[TensorFile], config: MistralConfig | None) -> Checkpoint:
    """The checkpoint of opened files with raw names."""
    directory = path if path.is_dir() else path.parent
    config = config or read_config(directory)
    rows = {row.raw.format(layer_of(name)): (name, row) for name, row in parameters(config) if row.raw}
    views = dequantised.dequantised(shards, directory / PARAMS, "quantization", schemes.read_raw, config)
    tensors = dequantised.labelled(stored_in_layout(views, config, rows, LAYOUT), views)
    if config.tie_word_embeddings and "output.weight" in tensors:  # a copy of the embedding, which matching compares
        tensors["lm_head.weight"] = tensors.pop("output.weight")
    return Checkpoint(
        path,
        format,
        {shard.path: shard for shard in shards},
        tensors,
        lambda: config,
        base.texts_in(directory),
    )


def read_config(directory: Path) -> MistralConfig:
    """params.json, and what it cannot say from the manifest of a conversion."""
    file = directory / PARAMS
    data = strict_json.read_object(file, error=ConfigError)
    fields, extra = read_fields(data, where=str(file))
    return carried.config(directory, {**fields, "extra": extra} if extra else fields)


def check(outline: Outline) -> None:
    """Raise UnsupportedFeatureError for what params.json cannot say."""
    base.refuse_heads(outline, "raw")
    dialects.write_raw(outline.config)


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """params.json, the texts, and places for the tensors."""
    base.write_texts(directory, outline.texts)
    params = json.dumps(dialects.write_raw(outline.config), indent=2) + "\n"
    files.write_file(directory / PARAMS, params.encode())
    names = {name: row.raw.format(layer_of(name)) for name, row in outline.rows().items() if row.raw}
    specs = base.specs_in_layout(outline, names, LAYOUT)
    infos = create_shards(directory, specs, limit, FAMILY)
    return base.targets_in_layout(infos, outline, names, LAYOUT)
