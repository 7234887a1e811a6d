"""A KerasHub preset: config.json of a MistralBackbone, weights in HDF5, kernels [in, heads, head_dim].

Its JSON files describe Keras objects by class; here they are data, of which the one class that is known is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import MistralConfig, rope
from ...disk import files, strict_json
from ...errors import (
    CheckpointIndexError,
    ConfigError,
    LimitExceededError,
    ShardMissingError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from ...parameters import Parameter, layer_of, parameter_count, parameters
from .. import carried, layouts
from ..containers import shards
from ..containers.hdf5 import file as hdf5_file
from ..containers.hdf5.file import Hdf5File
from ..containers.tensor_file import DTYPES, TensorInfo, quoted
from ..contents import Contents, stored_in_layout
from . import base
from .base import Outline, Target

layout_of = layouts.heads_kernel
SINGLE, INDEX = "model.weights.h5", "model.weights.json"
SHARD = "model_{:05d}.weights.h5"
SUFFIX = ".weights.h5"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
SENTENCEPIECE = "tokenizer.model"
TEXTS = "assets/hugging_face"
"""Where Hugging Face's own files travel: KerasHub has a tokenizer.json of another kind."""

_FIELDS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "rope_max_wavelength": "rope_theta",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "head_dim": "head_dim",
    "layer_norm_epsilon": "rms_norm_eps",
}
_DEFAULTS = {"rope_max_wavelength": 10000, "rope_scaling_factor": 1.0, "sliding_window": 512, "head_dim": None,
             "layer_norm_epsilon": 1e-6}  # fmt: skip
_VERSIONS = {"keras_version": "3.15.1", "keras_hub_version": "0.32.0"}


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Understand the structure of the files."""
    directory = path if path.is_dir() else path.parent
    opened = _open_files(path)
    config = config or read_config(directory)
    rows = {_path(name, row): (name, row) for name, row in parameters(config) if row.keras_hub}
    names = (name for file in opened for name in file.tensors)
    rows = {name: rows[now] for name in names if (now := hdf5_file.current_name(name)) in rows}
    texts = base.texts_in(directory / TEXTS)
    if (directory / VOCABULARY).exists():
        texts[SENTENCEPIECE] = base.reader(directory / VOCABULARY)
    return Contents(
        path,
        "keras-hub",
        {file.path: file for file in opened},
        stored_in_layout(opened, config, rows, layout_of),
        lambda: config,
        texts,
    )


def _path(name: str, row: Parameter) -> str:
    """Where Keras puts a tensor: layers are numbered from the second on."""
    layer = layer_of(name)
    return str(row.keras_hub).format(f"mistral_transformer_decoder_{layer}" if layer else "mistral_transformer_decoder")


def read_config(directory: Path) -> MistralConfig:
    """config.json, and what it cannot say from the manifest of a conversion."""
    file = directory / "config.json"
    data = strict_json.read_object(file, error=ConfigError)
    if data.get("registered_name") != "keras_hub>MistralBackbone" or not isinstance(data.get("config"), dict):
        raise UnsupportedFeatureError(f"{file} must be a MistralBackbone, got {data.get('registered_name')!r}.")
    given = {**_DEFAULTS, **data["config"]}
    absent = sorted(set(_FIELDS) - set(given))
    if absent:
        raise ConfigError(f"{file}: lacks {', '.join(absent)}; save the preset again.")
    fields = {field: given[key] for key, field in _FIELDS.items()}
    factor = given["rope_scaling_factor"]
    fields["rope_scaling"] = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    fields["dtype"] = _dtype(given.get("dtype"), str(file))
    return carried.config(directory, {**fields, "architectures": ("MistralForCausalLM",)})


def _dtype(policy: Any, where: str) -> str | None:
    """What the variables of a policy are stored as."""
    if isinstance(policy, Mapping) and isinstance(policy.get("config"), Mapping):
        policy = policy["config"].get("name")
    if not isinstance(policy, str | None):
        raise UnsupportedFeatureError(f"{where}: a dtype policy for each layer; save it in one float dtype.")
    return "float32" if policy and policy.startswith("mixed_") else policy


def _open_files(path: Path) -> list[Hdf5File]:
    """A single file, or every shard of an index, each holding exactly what is mapped to it."""
    if path.is_dir():
        path = path / SINGLE if (path / SINGLE).exists() or not (path / INDEX).exists() else path / INDEX
    if path.suffix != ".json":
        return [Hdf5File(path)]
    mapped = weight_map(path)
    names = sorted({name for places in mapped.values() for name in places})
    absent = [quoted(name) for name in names if not (path.parent / name).exists()]
    if absent:
        raise ShardMissingError(f"{path}: the shards {', '.join(absent)} are not there; download them.")
    opened = [Hdf5File(path.parent / name) for name in names]
    seen: set[str] = set()
    for file in opened:
        groups = {"/" + name.rpartition("/")[0] for name in file.tensors}
        expected = {group for group, places in mapped.items() if file.path.name in places}
        wrong = sorted(map(quoted, (groups ^ expected) | (seen & set(file.tensors))))
        if wrong:
            raise CheckpointIndexError(f"{path}: {file.path.name} and the index disagree on {', '.join(wrong)}.")
        seen |= set(file.tensors)
    return opened


def weight_map(index: Path) -> dict[str, list[str]]:
    """Group of variables -> the names of the shards with some of them."""
    data = strict_json.read_object(index, error=CheckpointIndexError, max_bytes=shards.MAX_INDEX_BYTES)
    weight_map = data.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map):
        raise CheckpointIndexError(f"{index}: weight_map must be a mapping of variables to files.")
    found = {group: names if isinstance(names, list) else [names] for group, names in weight_map.items()}
    distinct = []
    for group, names in found.items():
        for name in names:
            if not isinstance(name, str):
                raise CheckpointIndexError(f"{index}: a file of {quoted(group)} is {type(name).__name__}, not a name.")
            distinct.append(name)
    for name in set(distinct):
        files.check_bare_name(name, str(index))
        if not name.endswith(SUFFIX):
            raise UnsafeFileError(f"{index}: {quoted(name)} does not end with {SUFFIX}, as its shards must.")
    if len(set(distinct)) > shards.MAX_SHARDS:
        raise LimitExceededError(f"{index}: {len(set(distinct))} shards; at most {shards.MAX_SHARDS} are read.")
    return found


# Writing


def check(outline: Outline) -> None:
    """Raise UnsupportedFeatureError for what a MistralBackbone cannot say."""
    base.refuse_heads(outline, "keras-hub")
    config = outline.config
    scaling = (config.rope_scaling or {}).get("rope_type", "linear")
    for wrong, what in (
        (config.tie_word_embeddings, "tied embeddings"),
        (len(set(config.layer_windows)) > 1, "windows that differ by layer"),
        (scaling != "linear", f"rope_scaling of type {scaling!r}"),
        (rope.query_scaling(config) is not None, "queries scaled by their position"),
    ):
        if wrong:
            raise UnsupportedFeatureError(f"keras-hub: has no {what}; convert it to hf.")


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """The preset's JSON files, the texts, and places for the tensors."""
    dtype = DTYPES[next(iter(outline.dtypes.values()))].name
    _write_json(directory / "config.json", _backbone(outline.config, dtype))
    metadata = {**_VERSIONS, "parameter_count": parameter_count(outline.config), "tasks": ["CausalLM"]}
    _write_json(directory / "metadata.json", metadata)
    for name, content in outline.texts.items():
        files.write_file(directory / (VOCABULARY if name == SENTENCEPIECE else f"{TEXTS}/{name}"), content)
    if SENTENCEPIECE in outline.texts:
        config = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}
        _write_json(directory / "tokenizer.json", _serialized("tokenizer", "MistralTokenizer", "int32", config))
    names = {name: _path(name, row) for name, row in outline.rows().items()}
    specs = base.specs_in_layout(outline, names, layout_of)
    return base.targets_in_layout(_create_files(directory, specs, limit), outline, names, layout_of)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_file(path, json.dumps(content, indent=4).encode())


def _backbone(config: MistralConfig, dtype: str) -> dict[str, Any]:
    fields: dict[str, Any] = {key: getattr(config, field) for key, field in _FIELDS.items()}
    fields["sliding_window"] = config.layer_windows[0]
    fields["rope_scaling_factor"] = (config.rope_scaling or {"factor": 1.0})["factor"]
    return _serialized("backbone", "MistralBackbone", dtype, {**fields, "dropout": 0})


def _serialized(kind: str, name: str, dtype: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Keras' serialize_keras_object says of an object of KerasHub."""
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    return {
        "module": f"keras_hub.src.models.mistral.mistral_{kind}",
        "class_name": name,
        "config": {"name": f"mistral_{kind}", "trainable": True, "dtype": policy, **config},
        "registered_name": f"keras_hub>{name}",
    }


def _create_files(directory: Path, specs: shards.Specs, limit: int) -> dict[str, TensorInfo]:
    """Reserve every file and write their index, in which a group of variables may have several files."""
    sizes = {name: math.prod(shape) * DTYPES[code].itemsize for name, (code, shape) in specs.items()}
    files.require_space(directory, sum(sizes.values()))
    parts = shards.split(sizes, limit)
    infos: dict[str, TensorInfo] = {}
    weight_map: dict[str, list[str]] = {}
    for number, names in enumerate(parts):
        file = SINGLE if len(parts) == 1 else SHARD.format(number)
        infos |= hdf5_file.create(directory / file, {name: specs[name] for name in names})
        for group in dict.fromkeys(f"/{name.rpartition('/')[0]}" for name in names):
            weight_map.setdefault(group, []).append(file)
    if len(parts) > 1:
        single = {group: each[0] if len(each) == 1 else each for group, each in weight_map.items()}
        _write_json(directory / INDEX, {"metadata": {"total_size": float(sum(sizes.values()))}, "weight_map": single})
    return infos
