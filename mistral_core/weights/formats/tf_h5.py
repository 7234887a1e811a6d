"""tf_model.h5, as transformers' TensorFlow models wrote it through Keras 2: kernels [in, out], numbers in float32.

Keras 2 knows no bfloat16 here, so it goes in as the float32 of the same value, and a root attribute says what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ...config import MistralConfig
from ...errors import CorruptCheckpointError
from ...parameters import Parameter
from .. import layouts
from ..casting import narrowed, widened
from ..containers.hdf5 import file as hdf5_file
from ..containers.hdf5.file import Hdf5File
from ..containers.shards import Family, Specs, create_shards, open_files, weight_map_of
from ..containers.tensor_file import DTYPES, TensorInfo, quoted, write
from ..contents import Contents, StoredTensor, stored_in_layout
from . import base
from .base import Outline, Target
from .transformers_names import rows_by, tf_name

layout_of = layouts.kernel
SINGLE, INDEX = "tf_model.h5", "tf_model.h5.index.json"
WIDENED = "mistral_dtypes"
"""The root attribute of ours: `canonical name=BF16` for each tensor that is stored as float32 and is not."""


class TensorFlowFile(Hdf5File):
    """A file whose tensors have the names of TensorFlow's variables: tf_mistral_for_causal_lm/lm_head/kernel:0."""

    def __init__(self, path: Path, model: str = "") -> None:
        """Check a whole model (each layer a group that lists its variables) or a shard (variables without `model`)."""
        super().__init__(path)
        layers = self.texts("", "layer_names")
        if model:
            places = {f"{model}/{name}": name for name in layers}
        else:
            places = {name: f"{layer}/{name}" for layer in layers for name in self.texts(layer, "weight_names")}
        absent = sorted(quoted(place) for place in places.values() if place not in self.tensors)
        others = sorted(quoted(name) for name in set(self.tensors) - set(places.values()))
        if absent or others:
            what = f"lists {', '.join(absent)}, which it lacks" if absent else f"does not list {', '.join(others)}"
            raise CorruptCheckpointError(f"{path}: {what}; save the model again.")
        self.tensors = {name: self.tensors[place]._replace(name=name) for name, place in places.items()}


def _family(model: str, attributes: Callable[[Iterable[str]], hdf5_file.Attributes] = lambda names: {}) -> Family:
    """The files of a model whose variables begin with `model`; `attributes` makes ours of the names in a file."""

    def opened(path: Path) -> TensorFlowFile:
        return TensorFlowFile(path, "" if path.name == SINGLE else model)

    def create(path: Path, specs: Specs) -> dict[str, TensorInfo]:
        listed = dict(attributes(specs)[""])
        if path.name != SINGLE:
            bare = {name: name.removeprefix(f"{model}/") for name in specs}
            infos = hdf5_file.create(
                path,
                {bare[name]: spec for name, spec in specs.items()},
                {"": {"layer_names": [*bare.values()], **listed}},
            )
            return {name: infos[bare[name]] for name in specs}
        layers: dict[str, list[str]] = {}
        for name in specs:
            layers.setdefault(name.split("/")[1], []).append(name)
        root = {"layer_names": [*layers], "backend": "tensorflow", "keras_version": "2.19.0", **listed}
        groups = {layer: {"weight_names": names} for layer, names in layers.items()}
        places = {name: f"{layer}/{name}" for layer, names in layers.items() for name in names}
        infos = hdf5_file.create(path, {places[name]: spec for name, spec in specs.items()}, {"": root, **groups})
        return {name: infos[places[name]] for name in specs}

    return Family(SINGLE, "tf_model-{:05d}-of-{:05d}.h5", INDEX, opened, create)


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Understand the structure of the files."""
    index = path / INDEX if path.is_dir() else path
    sharded = index.name.endswith(".index.json") and index.exists()
    model = next(iter(weight_map_of(index, ".h5")[0])).partition("/")[0] if sharded else ""
    shards = open_files(path, _family(model))
    config = base.opened_config(path, config)()
    first = next((name.partition("/")[0] for shard in shards for name in shard.tensors), "")
    rows = rows_by(lambda name, row: f"{first}/{tf_name(name, row)}", config)
    tensors = stored_in_layout(shards, config, rows, layout_of)
    for shard in shards:
        for text in shard.texts("", WIDENED) if isinstance(shard, Hdf5File) else ():
            name, _, code = text.partition("=")
            if name not in tensors or (code, tensors[name].dtype) != ("BF16", "F32"):
                raise CorruptCheckpointError(f"{shard.path}: {WIDENED} says {quoted(text)}; save the model again.")
            tensors[name] = _narrow(tensors[name])
    return Contents(
        path,
        "tf-h5",
        {shard.path: shard for shard in shards},
        tensors,
        lambda: config,
        base.texts_in(path if path.is_dir() else path.parent),
    )


def _narrow(tensor: StoredTensor) -> StoredTensor:
    """The bfloat16 tensor that was stored as float32."""

    def load(rows: slice | None, cached: bool) -> np.ndarray:
        array = narrowed(tensor.load(rows, cached), DTYPES["BF16"])
        if array is None:
            raise CorruptCheckpointError(
                f"{tensor.file}: {quoted(tensor.name)} was widened from bfloat16 and no longer fits it; remove its "
                f"attribute {WIDENED}."
            )
        return array

    return tensor._replace(dtype="BF16", load=load)


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    model = _snake_case(f"TF{outline.architecture}")
    names = {name: f"{model}/{tf_name(name, row)}" for name, row in outline.rows().items()}
    specs = {
        names[name]: ("F32" if outline.dtypes[name] == "BF16" else outline.dtypes[name], shape)
        for name, (_, shape) in zip(names, base.specs_in_layout(outline, names, layout_of).values(), strict=True)
    }
    canonical = {names[name]: name for name, code in outline.dtypes.items() if code == "BF16" and name in names}

    def attributes(variables: Iterable[str]) -> hdf5_file.Attributes:
        texts = [f"{canonical[name]}=BF16" for name in variables if name in canonical]
        return {"": {WIDENED: texts} if texts else {}}

    infos = create_shards(directory, specs, limit, _family(model, attributes))
    return {name: _target(infos[names[name]], row, outline) for name, row in outline.rows().items()}


def _target(info: TensorInfo, row: Parameter, outline: Outline) -> Target:
    def put(array: np.ndarray) -> None:
        stored = layouts.to_stored(array, row, outline.config, layout_of(row))
        write(info, widened(stored) if info.dtype == "F32" else stored)

    return Target(put)


def _snake_case(name: str) -> str:
    """What Keras calls a model of a class: TFMistralForCausalLM is tf_mistral_for_causal_lm."""
    name = re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
