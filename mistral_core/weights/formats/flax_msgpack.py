"""flax_model.msgpack as transformers' Flax models wrote it: a nested tree, kernels [in, out]."""

from __future__ import annotations

from pathlib import Path

from ...config import MistralConfig
from ...parameters import BASE_PREFIX
from .. import layouts
from ..containers.msgpack import writing as msgpack_writing
from ..containers.msgpack.file import MsgpackFile
from ..containers.shards import Family, create_shards, open_files
from ..opened import Checkpoint, stored_in_layout
from . import base
from .base import Outline, Target
from .transformers_names import flax_name, lacking, rows_by

FAMILY = Family(
    "flax_model.msgpack",
    "flax_model-{:05d}-of-{:05d}.msgpack",
    "flax_model.msgpack.index.json",
    MsgpackFile,
    msgpack_writing.create,
)
_PREFIX = BASE_PREFIX.replace(".", "/")
LAYOUT = layouts.kernel


def open(path: Path, config: MistralConfig | None) -> Checkpoint:
    """Walk the trees."""
    shards = open_files(path, FAMILY)
    config = base.opened_config(path, config)()
    prefix = lacking(_PREFIX, (name for shard in shards for name in shard.tensors))
    return Checkpoint(
        path,
        "flax-msgpack",
        {shard.path: shard for shard in shards},
        stored_in_layout(shards, config, rows_by(flax_name, config, prefix=prefix), LAYOUT),
        lambda: config,
        base.texts_in(path if path.is_dir() else path.parent),
    )


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    prefix = _PREFIX if outline.architecture == "MistralModel" else ""
    names = {name: flax_name(name, row).removeprefix(prefix) for name, row in outline.rows().items()}
    infos = create_shards(directory, base.specs_in_layout(outline, names, LAYOUT), limit, FAMILY)
    return base.targets_in_layout(infos, outline, names, LAYOUT)
