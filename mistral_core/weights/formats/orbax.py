"""Orbax checkpoints of our Flax models: `model.params` by the table's names, or the modules' own nested state.

`orbax.checkpoint.StandardCheckpointer().restore(directory / "params")` gives what `model.bind` takes.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from ...config import MistralConfig
from ...errors import CheckpointNotFoundError, CorruptCheckpointError
from ...parameters import BASE_PREFIX, HEADS, parameters, shape_of
from ..containers import tensor_file
from ..containers.zarr import tree as zarr_tree
from ..containers.zarr import writing as zarr_writing
from ..containers.zarr.tree import ZarrTree
from ..containers.zarr.writing import ZarrArray
from ..contents import Contents, StoredTensor
from . import base
from .base import Outline, Target
from .transformers_names import lacking

FOLDER = "params"

_STACKED = re.compile(r"^(|model\.)layers\.(?!\d)")


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Understand the tree; the config lies beside the Orbax directory or in it."""
    directory = path if (path / zarr_tree.METADATA).exists() else path / FOLDER
    folder = _folder_of_config(path, directory)
    if not directory.is_dir():
        raise _nothing(path)
    tree = ZarrTree(directory)
    config = base.opened_config(folder, config)()
    return Contents(
        path,
        "orbax",
        tree.files,
        _tensors(tree, config),
        lambda: config,
        base.texts_in(folder),
        folder,
    )


def _folder_of_config(path: Path, directory: Path) -> Path:
    """The first of the directory and its parent with a config, if the path is the Orbax directory itself."""
    if path == directory and not (path / "config.json").exists() and (path.absolute().parent / "config.json").exists():
        return path.absolute().parent
    return path


def _nothing(path: Path) -> Exception:
    unfinished = path.is_dir() and any(zarr_tree.UNFINISHED in entry.name for entry in path.iterdir())
    if unfinished:
        return CorruptCheckpointError(f"{path}: Orbax never finished writing {FOLDER}; save it again.")
    return CheckpointNotFoundError(f"{path} must have {FOLDER}/{zarr_tree.METADATA}; check the path.")


def _tensors(tree: ZarrTree, config: MistralConfig) -> dict[str, StoredTensor]:
    """Canonical name -> tensor; layers that `scan_layers` stacked are taken apart."""
    names = {name: name.removesuffix(".value") for name in tree.tensors}  # nnx.State keeps a leaf under `value`
    prefix = lacking(BASE_PREFIX, names.values())
    untied = config.replace(tie_word_embeddings=False)
    rows = {name: row for architecture in HEADS for name, row in parameters(untied, architecture)}
    shapes = {name.removeprefix(prefix): shape_of(row, config) for name, row in rows.items()}
    found = {}
    for stored_name, name in names.items():
        template = _STACKED.sub(r"\1layers.{}.", name)
        if template == name or template.format(0) not in shapes:
            found[name] = zarr_tree.stored(tree, stored_name, shapes.get(name))
            continue
        for index, layer in zarr_tree.layers_in(tree, stored_name, 0):
            found[template.format(index)] = zarr_tree.stored(
                tree, stored_name, shapes.get(template.format(index)), layer=layer
            )
    return found


def check(outline: Outline) -> None:
    """Everything can be expressed; raises MissingExtraError, for what is written is read back."""
    zarr_tree.library()


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and the flat tree of `model.params`."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    shapes = {name: shape_of(row, outline.config) for name, row in outline.rows().items()}
    (directory / FOLDER).mkdir()
    infos = zarr_writing.create(
        directory / FOLDER, [ZarrArray((name,), outline.dtypes[name], shape) for name, shape in shapes.items()]
    )
    return {name: Target(partial(tensor_file.write, infos[name, 0])) for name in shapes}
