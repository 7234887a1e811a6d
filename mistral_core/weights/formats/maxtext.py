"""MaxText's parameters in Orbax: heads are an axis of their own, queries are divided by sqrt(head_dim).

The layers are one stack along axis 1 of every array (`scan_layers=True`, MaxText's default), or trees of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...config import MistralConfig
from ...errors import CheckpointNotFoundError, ConversionError, CorruptCheckpointError, LossyConversionError
from ...parameters import Parameter, layer_of, parameters
from .. import layouts
from ..containers import tensor_file
from ..containers.tensor_file import DTYPES, TensorInfo
from ..containers.zarr import tree as zarr_tree
from ..containers.zarr import writing as zarr_writing
from ..containers.zarr.tree import ZarrTree
from ..containers.zarr.writing import ZarrArray
from ..contents import Contents, StoredTensor
from . import base
from .base import Outline, Target

ITEMS = Path("0", "items")
layout_of = layouts.heads_kernel

_STACK_AXIS = 1
_BLOCK = 1 << 20  # numbers that are widened at once


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Understand the tree; `config` is for a directory as MaxText leaves it, without config.json."""
    directory = _items(path)
    folder = next(
        (p for p in (directory, directory.parent, directory.parent.parent, path) if (p / "config.json").exists()), path
    )
    if config is None and not (folder / "config.json").exists():
        raise CheckpointNotFoundError(
            f"{path}: there is no config.json, and MaxText's weights do not say what it would; copy it there or pass "
            "config=."
        )
    config = base.opened_config(folder, config)()
    under_params = any(name.startswith("params.") for name in zarr_tree.describe(directory).names)
    tree = ZarrTree(directory, lambda name: not under_params or name.startswith("params."))
    return Contents(path, "maxtext", tree.files, _tensors(tree, config), lambda: config, base.texts_in(folder), folder)


def _items(path: Path) -> Path:
    """The Orbax directory: the path itself, or the items of it or of its only step."""
    for directory in (path, path / "items"):
        if (directory / zarr_tree.METADATA).exists():
            return directory.absolute()
    steps = sorted(entry.name for entry in path.iterdir() if entry.name.isdigit()) if path.is_dir() else []
    if len(steps) > 1:
        raise ConversionError(f"{path}: holds the steps {', '.join(steps)}; give the path of one of them.")
    if steps and (path / steps[0] / "items" / zarr_tree.METADATA).exists():
        return (path / steps[0] / "items").absolute()
    if steps and any(zarr_tree.UNFINISHED in entry.name for entry in (path / steps[0]).iterdir()):
        raise CorruptCheckpointError(f"{path}: Orbax never finished writing step {steps[0]}; save it again.")
    raise CheckpointNotFoundError(f"{path} must have {ITEMS}/{zarr_tree.METADATA}; check the path.")


def _tensors(tree: ZarrTree, config: MistralConfig) -> dict[str, StoredTensor]:
    rows = dict(parameters(config.replace(tie_word_embeddings=False)))
    alone = {_name(row, f"layers_{layer_of(name)}"): (name, row) for name, row in rows.items()}
    stacks = {_name(row, "layers"): row for name, row in rows.items() if layer_of(name) is not None}
    found = {}
    for stored_name in tree.tensors:
        name = stored_name
        while name.startswith("params."):
            name = name.removeprefix("params.")
        if name in stacks:
            for index, layer in zarr_tree.layers_in(tree, stored_name, _STACK_AXIS):
                found[stacks[name].name.format(index)] = _stored(tree, stored_name, stacks[name], config, layer)
        elif name in alone:
            canonical, row = alone[name]
            found[canonical] = _stored(tree, stored_name, row, config, None)
        else:
            found[stored_name.replace(".", "/")] = zarr_tree.stored(tree, stored_name)  # never a name of the table
    return found


def _name(row: Parameter, layer: str) -> str:
    assert row.maxtext is not None  # every row of a language model has one
    return row.maxtext.format(layer).replace("/", ".")


def _stored(
    tree: ZarrTree, name: str, row: Parameter, config: MistralConfig, layer: tuple[int, int] | None
) -> StoredTensor:
    layout = layout_of(row)
    scale = _query_scale(row, config)

    def canonical(array: np.ndarray) -> np.ndarray:
        whole = layouts.to_canonical(array, row, config, layout)
        return multiplied(whole, scale) if scale else whole

    found = zarr_tree.stored(tree, name, layouts.stored_shape(row, config, layout), layer=layer, then=canonical)
    loss = f"query scale 1/sqrt({config.head_dim}) undone by rounding" if scale and not _exact(scale) else ""
    moves = ", ".join(part for part in (layout.moves, "queries scaled" if scale else "") if part)
    return found._replace(moves=moves, loss=loss)


# Writing


def check(outline: Outline) -> None:
    """Raise UnsupportedFeatureError for heads that MaxText's tree has no place for, and MissingExtraError."""
    base.refuse_heads(outline, "maxtext")
    zarr_tree.library()


def lossy(outline: Outline) -> dict[str, str]:
    """Canonical name -> why its numbers do not all come back, whatever they are."""
    found = {}
    for name, row in outline.rows().items():
        scale = _query_scale(row, outline.config)
        if scale and not _exact(scale):
            found[name] = f"divided by sqrt({outline.config.head_dim}) and rounded to {outline.dtypes[name]}"
        elif scale and scale > 1 and outline.dtypes[name] == "F16":
            found[name] = f"divided by {scale:g}, which float16 cannot do to its small numbers without rounding"
    return found


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and the tree of parameters, its layers stacked unless `maxtext_scanned` is "no"."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    scanned = outline.options.get("maxtext_scanned") != "no"
    places = {name: _place(name, row, outline, scanned) for name, row in outline.rows().items()}
    (directory / ITEMS).mkdir(parents=True)
    infos = zarr_writing.create(directory / ITEMS, dict.fromkeys(array for array, _ in places.values()))
    flagged, allowed = lossy(outline), outline.options.get("allow_lossy") == "yes"
    targets = {}
    for name, row in outline.rows().items():
        array, layer = places[name]
        targets[name] = _target(infos[array.name, layer], row, outline)
        if scale := _query_scale(row, outline.config):
            targets[name] = _divided_first(targets[name], name, scale, may_lose=allowed or name in flagged)
    return targets


def _place(name: str, row: Parameter, outline: Outline, scanned: bool) -> tuple[ZarrArray, int]:
    """The array that a tensor goes to, and which layer of it."""
    layer = layer_of(name)
    stacked = scanned and layer is not None
    path = ("params", "params", *_name(row, "layers" if stacked else f"layers_{layer}").split("."))
    shape = layouts.stored_shape(row, outline.config, layout_of(row))
    stack = (_STACK_AXIS, outline.config.num_hidden_layers) if stacked else None
    return ZarrArray(path, outline.dtypes[name], shape, stack), layer if layer is not None and stacked else 0


def _target(info: TensorInfo, row: Parameter, outline: Outline) -> Target:
    def write(array: np.ndarray) -> None:
        tensor_file.write(info, layouts.to_stored(array, row, outline.config, layout_of(row)))

    return Target(write)


def _divided_first(target: Target, name: str, scale: float, *, may_lose: bool) -> Target:
    """A target of queries; raises LossyConversionError for what would not come back, unless it may."""

    def comes_back(array: np.ndarray) -> np.ndarray:
        return multiplied(divided(array, scale), scale)

    def write(array: np.ndarray) -> None:
        if not may_lose and tensor_file.as_bytes(comes_back(array)) != tensor_file.as_bytes(array):
            raise LossyConversionError(
                f"{name}: holds numbers too small to be divided by {scale:g} without rounding; pass allow_lossy "
                "(--allow-lossy) if that is meant."
            )
        target.write(divided(array, scale))

    return Target(write, comes_back)


# The scale of the queries


def _query_scale(row: Parameter, config: MistralConfig) -> float:
    """What a query kernel is divided by; 0 for other tensors."""
    return math.sqrt(config.head_dim) if row.axes[0] == "NH" else 0.0


def _exact(scale: float) -> bool:
    """Whether dividing by it only changes exponents."""
    return math.frexp(scale)[0] == 0.5


def divided(array: np.ndarray, scale: float) -> np.ndarray:
    """Every finite number divided and rounded once; the others keep their bits."""
    return _each(array, lambda wide: wide / scale)


def multiplied(array: np.ndarray, scale: float) -> np.ndarray:
    """Every finite number multiplied and rounded once; the others keep their bits."""
    return _each(array, lambda wide: wide * scale)


def _each(array: np.ndarray, operation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    kind = np.dtype(f"u{array.dtype.itemsize}")
    bits = np.ascontiguousarray(array).view(kind)
    if kind.itemsize == 2:  # there are only so many numbers
        every = np.arange(1 << 16, dtype=kind)
        return _rounded(every.view(array.dtype), operation).view(kind)[bits].view(array.dtype)
    result = np.empty_like(bits).reshape(-1)
    flat = bits.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].view(array.dtype)
        result[start : start + _BLOCK] = _rounded(block, operation).view(kind)
    return result.view(array.dtype).reshape(array.shape)


def _rounded(array: np.ndarray, operation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    with np.errstate(all="ignore"):
        result = operation(array.astype(DTYPES["F64"])).astype(array.dtype)
        finite = np.isfinite(array)
    kind = np.dtype(f"u{array.dtype.itemsize}")
    bits: np.ndarray = np.where(finite, result.view(kind), array.view(kind))
    return bits.view(array.dtype)
