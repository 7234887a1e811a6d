"""The formats that are shards of one container, with names and a layout of their own: one row each of one class."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...compat import unread
from ...config import MistralConfig, params_json, read_fields
from ...disk import files, strict_json
from ...errors import ConfigError, UnsupportedFeatureError
from ...parameters import BASE_PREFIX, Parameter, layer_of
from ...quantization import schemes
from ...quantization.schemes import Schemes
from .. import carried, dequantised, layouts, towers
from ..containers import shards
from ..containers.msgpack import writing as msgpack_writing
from ..containers.msgpack.file import MsgpackFile
from ..containers.shards import Family, create_shards, open_files, safetensors_family
from ..containers.tensor_file import TensorFile
from ..contents import Contents, StoredTensor, stored_as_it_is, stored_in_layout
from ..layouts import Layout
from ..towers import WHOLES, Whole
from . import base
from .base import Outline, Target
from .transformers_names import flax_name, lacking, rows_by, tf_name

# The file beside the weights


class Description(NamedTuple):
    """The JSON file that says what the numbers mean: the config, and how matrices are packed."""

    file: str
    read: Callable[[Path], MistralConfig]
    """Of a directory; raises ConfigError."""
    check: Callable[[Outline], None]
    """Raises UnsupportedFeatureError for what the file cannot say."""
    write: Callable[[Path, Outline], None]
    packing: str
    """The key under which a scheme of packed matrices stands."""
    read_schemes: Callable[..., Schemes]


def _check_nothing(outline: Outline) -> None:
    """Everything can be expressed."""


CONFIG = Description(
    "config.json",
    MistralConfig.from_pretrained,
    _check_nothing,
    base.write_hugging_face_config,
    "quantization_config",
    schemes.read,
)


def _read_params(directory: Path) -> MistralConfig:
    """params.json, and what it cannot say from the manifest of a conversion."""
    file = directory / "params.json"
    data = strict_json.read_object(file, error=ConfigError)
    fields, extra = read_fields(data, where=str(file))
    return carried.config(directory, {**fields, "extra": extra} if extra else fields)


def _check_params(outline: Outline) -> None:
    base.refuse_heads(outline, "raw")
    params_json.write(outline.config, with_vision=bool(outline.others))


def _write_params(directory: Path, outline: Outline) -> None:
    text = json.dumps(params_json.write(outline.config, with_vision=bool(outline.others)), indent=2) + "\n"
    files.write_file(directory / "params.json", text.encode())


PARAMS = Description("params.json", _read_params, _check_params, _write_params, "quantization", schemes.read_raw)

# The class


@dataclass(frozen=True)
class Sharded:
    """A format that is shards of one container, with names and a layout of its own."""

    name: str
    family: Family
    described: Description = CONFIG
    file_name: Callable[[str, Parameter], str | None] | None = None
    """A tensor's name in the files, or None where they have no such tensor. Without it they have the table's own names
    and layout, and it takes no config to open them."""
    layout_of: Callable[[Parameter], Layout] = layouts.as_it_is
    prefix: str = ""
    """What the names of a bare model lack."""

    def open(self, path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
        """Understand the headers; raises what opening shards, reading a config and a scheme of packing raise."""
        opened = open_files(path, self.family, seen)
        file = (path if path.is_dir() else path.parent) / self.described.file
        read_config = functools.cache(lambda: config or self.described.read(file.parent))
        names = list(_names(opened))
        whole = towers.whole_of(self.name, names, lambda: read_config() if config or file.exists() else None)
        skipped = frozenset(filter(whole.tower, names)) if whole is not None else frozenset()
        if whole is not None and whole.text and config is None:
            read_config = functools.cache(functools.partial(towers.with_ties, read_config(), names, file))
        views = self._unpacked(path, opened, read_config, skipped)
        return Contents(
            path,
            self.name,
            {shard.path: shard for shard in opened},
            dequantised.labelled(self._tensors(views, read_config, whole, skipped, path), views),
            read_config,
            base.texts_in(file.parent),
            skipped=stored_as_it_is(opened, skipped),
        )

    def _tensors(
        self,
        views: list[TensorFile],
        read_config: Callable[[], MistralConfig],
        whole: Whole | None,
        skipped: Collection[str],
        where: Path,
    ) -> dict[str, StoredTensor]:
        """The tensors of the table by its names, and those that nobody knows by their own."""
        names = {name for name in _names(views) if name not in skipped}
        if self.file_name is not None:
            rows = rows_by(self.file_name, read_config(), prefix=lacking(self.prefix, names))
            return stored_in_layout(views, read_config(), rows, self.layout_of, names)
        tensors = stored_as_it_is(views, names)
        if whole is None:
            return tensors
        return {canonical: tensors[name] for name, canonical in towers.canonical(whole, names, where).items()}

    def _unpacked(
        self,
        path: Path,
        opened: list[TensorFile],
        read_config: Callable[[], MistralConfig],
        skipped: Collection[str],
    ) -> list[TensorFile]:
        """The files, or a view of them in which packed matrices are floats."""
        if unread.is_mlx(set(_names(opened))):
            raise UnsupportedFeatureError(
                f"{path}: packed by MLX (scales and biases beside the weights), which is not read; write it with "
                "mlx_lm.convert --dequantize."
            )
        file = (path if path.is_dir() else path.parent) / self.described.file
        described = self.described
        return dequantised.dequantised(
            opened, file, described.packing, described.read_schemes, read_config, left_out=skipped
        )

    def check(self, outline: Outline) -> None:
        """Raise UnsupportedFeatureError for what the description cannot say."""
        self.described.check(outline)

    def create(self, directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
        """The description, the texts, and places for the tensors."""
        base.write_texts(directory, outline.texts)
        self.described.write(directory, outline)
        names = self._names_of(outline)
        infos = create_shards(directory, base.specs_in_layout(outline, names, self.layout_of), limit, self.family)
        return base.targets_in_layout(infos, outline, names, self.layout_of)

    def _names_of(self, outline: Outline) -> dict[str, str]:
        """Canonical name -> name in the file."""
        named = {name: self.file_name(name, row) if self.file_name else name for name, row in outline.rows().items()}
        named |= {name: name for name in outline.parts()}
        if outline.others:
            return {name: WHOLES[self.name].stored(stored) for name, stored in named.items() if stored is not None}
        prefix = self.prefix if outline.architecture == "MistralModel" else ""
        return {name: stored.removeprefix(prefix) for name, stored in named.items() if stored is not None}


def _names(opened: Iterable[TensorFile]) -> Iterable[str]:
    return (name for shard in opened for name in shard.tensors)


# The rows


def raw_name(name: str, row: Parameter) -> str | None:
    """The name in consolidated.*: layers.0.attention.wq.weight."""
    return row.raw and row.raw.format(layer_of(name))


def _dotted_flax_name(name: str, row: Parameter) -> str:
    return flax_name(name, row).replace("/", ".")


_MODEL_SHARD = "model-{:05d}-of-{:05d}.safetensors"

HF = Sharded("hf", shards.HUGGING_FACE, prefix=BASE_PREFIX)
"""Hugging Face safetensors."""

RAW = Sharded(
    "raw",
    safetensors_family("consolidated", "consolidated-{:05d}-of-{:05d}.safetensors", framework="pt"),
    PARAMS,
    raw_name,
    layouts.rotary_pairs,
)
"""Mistral's own: consolidated.safetensors and params.json, rotary rows in interleaved pairs."""

FLAX_MSGPACK = Sharded(
    "flax-msgpack",
    Family(
        "flax_model.msgpack",
        "flax_model-{:05d}-of-{:05d}.msgpack",
        "flax_model.msgpack.index.json",
        MsgpackFile,
        msgpack_writing.create,
    ),
    CONFIG,
    flax_name,
    layouts.kernel,
    BASE_PREFIX.replace(".", "/"),
)
"""flax_model.msgpack as transformers' Flax models wrote it: a nested tree, kernels [in, out]."""

FLAX_SAFETENSORS = Sharded(
    "flax-safetensors",
    safetensors_family("model", _MODEL_SHARD, framework="flax"),
    CONFIG,
    _dotted_flax_name,
    layouts.kernel,
    BASE_PREFIX,
)
"""Safetensors as transformers' Flax models wrote them: their paths joined by dots, kernels [in, out]."""

TF_SAFETENSORS = Sharded(
    "tf-safetensors",
    safetensors_family("model", _MODEL_SHARD, framework="tf"),
    CONFIG,
    tf_name,
    layouts.kernel,
)
"""Safetensors as transformers' TensorFlow models wrote them: the names of their variables, kernels [in, out]."""
