"""Safetensors as transformers' Flax models wrote them: their paths joined by dots, kernels [in, out]."""

from __future__ import annotations

from pathlib import Path

from ...config import MistralConfig
from ...parameters import BASE_PREFIX, Parameter
from .. import layouts
from ..containers.shards import create_shards, open_files, safetensors_family
from ..opened import Checkpoint, stored_in_layout
from . import base
from .base import Outline, Target
from .transformers_names import flax_name, lacking, rows_by

FAMILY = safetensors_family("model", "model-{:05d}-of-{:05d}.safetensors", framework="flax")
LAYOUT = layouts.kernel


def open(path: Path, config: MistralConfig | None) -> Checkpoint:
    """Understand the headers."""
    shards = open_files(path, FAMILY)
    config = base.opened_config(path, config)()
    prefix = lacking(BASE_PREFIX, (name for shard in shards for name in shard.tensors))
    return Checkpoint(
        path,
        "flax-safetensors",
        {shard.path: shard for shard in shards},
        stored_in_layout(shards, config, rows_by(_name, config, prefix=prefix), LAYOUT),
        lambda: config,
        base.texts_in(path if path.is_dir() else path.parent),
    )


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    prefix = BASE_PREFIX if outline.architecture == "MistralModel" else ""
    names = {name: _name(name, row).removeprefix(prefix) for name, row in outline.rows().items()}
    infos = create_shards(directory, base.specs_in_layout(outline, names, LAYOUT), limit, FAMILY)
    return base.targets_in_layout(infos, outline, names, LAYOUT)


def _name(name: str, row: Parameter) -> str:
    return flax_name(name, row).replace("/", ".")
