"""Safetensors as transformers' TensorFlow models wrote them: the names of their variables, kernels [in, out]."""

from __future__ import annotations

from pathlib import Path

from ...config import MistralConfig
from .. import layouts
from ..containers.shards import create_shards, open_files, safetensors_family
from ..opened import Checkpoint, stored_in_layout
from . import base
from .base import Outline, Target
from .transformers_names import rows_by, tf_name

FAMILY = safetensors_family("model", "model-{:05d}-of-{:05d}.safetensors", framework="tf")
LAYOUT = layouts.kernel


def open(path: Path, config: MistralConfig | None) -> Checkpoint:
    """Understand the headers."""
    shards = open_files(path, FAMILY)
    config = base.opened_config(path, config)()
    return Checkpoint(
        path,
        "tf-safetensors",
        {shard.path: shard for shard in shards},
        stored_in_layout(shards, config, rows_by(tf_name, config), LAYOUT),
        lambda: config,
        base.texts_in(path if path.is_dir() else path.parent),
    )


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    names = {name: tf_name(name, row) for name, row in outline.rows().items()}
    infos = create_shards(directory, base.specs_in_layout(outline, names, LAYOUT), limit, FAMILY)
    return base.targets_in_layout(infos, outline, names, LAYOUT)
