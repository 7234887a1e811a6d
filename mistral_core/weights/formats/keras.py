"""What Keras saves of our own TensorFlow models: a .keras archive or a .weights.h5, of which only numbers are loaded.

The paths are those that Keras gives to the parts of mistral_tf's models; a test holds them in place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...config import MistralConfig
from ...disk import files, limits, reading, strict_json
from ...disk.reading import opened
from ...errors import ConfigError, CorruptCheckpointError, UnsupportedFeatureError
from ...parameters import BASE_PREFIX, HEADS, Parameter, layer_of, parameters
from .. import layouts
from ..containers.hdf5 import file as hdf5_file
from ..containers.hdf5.file import Hdf5File
from ..containers.stored_zip import StoredZip
from ..containers.tensor_file import DTYPES, quoted
from ..contents import Contents, stored_in_layout
from . import base
from .base import Outline, Target

ARCHIVE, WEIGHTS = "model.keras", "model.weights.h5"
SUFFIXES = (".keras", ".weights.h5")
MAX_MEMBERS = limits.ZIP_MEMBERS

_ALLOWED = re.compile(r"(metadata|config)\.json|model\.weights\.(h5|npz)|assets/(?!.*\.\.)[\w./-]*")
_BODY = "layers/mistral_model/"
_HEAD, _LINEAR = "layers/head/vars", "layers/linear/vars"
"""Where the numbers of a head are, and where they were when a head was called a linear layer."""
_PLACES = {"weight": 0, "bias": 1}


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Understand the structure of the file."""
    file = _file_in(path) if path.is_dir() else path
    texts = base.texts_in(file.parent)
    if file.name.endswith(".keras"):
        weights, told = _open_archive(file)
        config = config or _config(told, str(file))
        texts |= _generation_config(told)
    else:
        weights = Hdf5File(file)
        config = config or base.opened_config(path, None)()
    rows = _rows(weights, config)
    tensors = stored_in_layout([weights], config, rows, layouts.as_it_is)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    found = config
    return Contents(path, "keras", {weights.path: weights}, kept, lambda: found, texts)


def _file_in(directory: Path) -> Path:
    """The one file of a directory; a loose one may have any name."""
    for name in (ARCHIVE, WEIGHTS):
        if (directory / name).exists():
            return directory / name
    loose = [name for name in reading.names(directory) if name.endswith(SUFFIXES)]
    if len(loose) != 1:
        raise base.nothing_here(directory, f"{ARCHIVE} or {WEIGHTS}")
    return directory / loose[0]


# The archive


def _open_archive(path: Path) -> tuple[Hdf5File, dict[str, Any]]:
    """The weights of a .keras file and what its config.json says."""
    with opened(path) as descriptor:
        archive = StoredZip(path, descriptor, _ALLOWED, MAX_MEMBERS, root="model/")
        if WEIGHTS not in archive.members:
            raise UnsupportedFeatureError(f"{path}: has no {WEIGHTS}; save the model again with Keras 3, as HDF5.")
        text = archive.read("config.json", strict_json.MAX_BYTES)
        start, size = archive.members[WEIGHTS]
    return Hdf5File(path, start=start, size=size), strict_json.parse_object(text, where=str(path), error=ConfigError)


def _config(told: Mapping[str, Any], where: str) -> MistralConfig:
    """The config of one of our models; the class is a name, and nothing is imported for it."""
    own = told.get("config")
    if not (isinstance(own, Mapping) and isinstance(own.get("config"), Mapping)):
        raise UnsupportedFeatureError(f"{where} must be a mistral_tf model, got {str(told.get('class_name'))[:80]!a}.")
    config = MistralConfig.from_dict(own["config"], where=where)
    architecture = told.get("class_name")
    return config.replace(architectures=(architecture,)) if architecture in HEADS else config


def _generation_config(told: Mapping[str, Any]) -> dict[str, Callable[[], bytes]]:
    own = told.get("config")
    given = own.get("generation_config") if isinstance(own, Mapping) else None
    text = json.dumps(given, indent=2, sort_keys=True).encode() + b"\n"
    return {"generation_config.json": lambda: text} if isinstance(given, Mapping) else {}


# Names


def _place(name: str, row: Parameter, body: str, head: str = _HEAD) -> str:
    """Where Keras puts a tensor: layers/mistral_model/decoder_layers/decoder_layer_1/mlp/up_proj/vars/0."""
    *owner, leaf = name.split(".")
    if row.kind == "head":
        return f"{head}/{_PLACES[leaf]}"
    layer = layer_of(name)
    if layer is not None:
        group = f"decoder_layers/decoder_layer{f'_{layer}' if layer else ''}/{'/'.join(owner[3:])}"
    else:  # the norm is found in Keras' own list of layers, which comes before it in the alphabet
        group = "layers/rms_norm" if row.kind == "norm" else owner[-1]
    return f"{body}{group}/vars/0"


def _rows(weights: Hdf5File, config: MistralConfig) -> dict[str, tuple[str, Parameter]]:
    """Place -> (canonical name, row), of the class that the file shows.

    Raises CorruptCheckpointError where the name that Keras noted for a variable is another one's.
    """
    body = _BODY if any(name.startswith(_BODY) for name in weights.tensors) else ""
    classes = {row.name.partition(".")[0]: architecture for architecture, rows in HEADS.items() for row in rows}
    head = _LINEAR if any(name.startswith(_LINEAR) for name in weights.tensors) else _HEAD
    noted_head = "".join(weights.texts(head, "name"))
    named = next((each for each in config.architectures or () if each in HEADS), "MistralForCausalLM")
    rows = {}
    for name, row in parameters(config.replace(tie_word_embeddings=False), classes.get(noted_head, named)):
        place, owner = _place(name, row, body, head), name.rpartition(".")[0]
        noted = weights.texts(place.rpartition("/")[0], "name")
        wanted = owner.removeprefix(BASE_PREFIX)
        if noted and noted[0] != wanted and not noted[0].endswith(f".{wanted}"):
            raise CorruptCheckpointError(
                f"{weights.path}: {quoted(place)} must be noted as {owner}, got {quoted(noted[0])}; save it again."
            )
        rows[place] = (name, row)
    return rows


# Writing


def check(outline: Outline) -> None:
    """Everything can be expressed."""


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """config.json, the texts, and places for the tensors, in one file whatever the limit is."""
    base.write_texts(directory, outline.texts)
    base.write_hugging_face_config(directory, outline)
    bare = outline.architecture == "MistralModel"
    names = {name: _place(name, row, "" if bare else _BODY) for name, row in outline.rows().items()}
    notes = {place.rpartition("/")[0]: {"name": name.rpartition(".")[0]} for name, place in names.items()}
    specs = base.specs_in_layout(outline, names)
    files.require_space(directory, sum(math.prod(shape) * DTYPES[code].itemsize for code, shape in specs.values()))
    return base.targets_in_layout(hdf5_file.create(directory / WEIGHTS, specs, notes), outline, names)
