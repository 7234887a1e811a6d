"""What a format is asked for, and what it answers: the same few things, whatever its files look like."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ...config import MistralConfig
from ...disk import files, limits, reading
from ...disk.names import TEXT_FILES, template_names
from ...errors import CheckpointNotFoundError, UnsupportedFeatureError
from ...parameters import Parameter, parameters
from ...quantization import storage
from ...quantization.storage import Arrangement
from .. import layouts
from ..containers import tensor_file
from ..containers.shards import Specs
from ..containers.tensor_file import UNSEEN as UNSEEN
from ..containers.tensor_file import Seen as Seen
from ..containers.tensor_file import TensorInfo
from ..contents import Contents
from ..layouts import Layout


@dataclass(frozen=True)
class Outline:
    """A checkpoint that is to be written: everything but its numbers."""

    config: MistralConfig
    architecture: str
    dtypes: Mapping[str, str]
    """Canonical name -> dtype code, in table order."""
    texts: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """By the names of `TEXT_FILES`."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What only one format asks for, such as GGUF's quantised type."""
    packed: Mapping[str, Arrangement] = field(default_factory=dict)
    """Canonical name -> how the matrix is packed, of those that are."""
    others: Specs = field(default_factory=dict)
    """Tensors of the other towers of a model of which this is the text part, which a file of the whole holds too."""

    def rows(self) -> dict[str, Parameter]:
        """Canonical name -> row of the table, of the tensors of floats."""
        return {name: row for name, row in parameters(self.config, self.architecture) if name not in self.packed}

    @property
    def dtype(self) -> str:
        """The dtype of the first tensor, which is what the config says of all."""
        return tensor_file.DTYPES[next(iter(self.dtypes.values()))].name

    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Canonical name of a packed matrix' module, and of its part -> (dtype code, shape)."""
        return {
            f"{name.removesuffix('weight')}{part}": (tensor_file.STORED_CODES[dtype], shape)
            for name, arrangement in self.packed.items()
            for part, (dtype, shape) in storage.specs_of(arrangement, self.dtype).items()
        }


class Target(NamedTuple):
    """Where one tensor goes."""

    write: Callable[[np.ndarray], None]
    """Takes the array in the table's layout and in the outline's dtype."""
    comes_back: Callable[[np.ndarray], np.ndarray] = lambda array: array
    """What a reader will get instead of the array, where the format loses something."""


class Format(Protocol):
    """What a format has, be it a module or an object; `Lossy` and `Moving` say what it may have besides."""

    def open(self, path: Path, config: MistralConfig | None, seen: Seen = UNSEEN) -> Contents:
        """Understand the headers of a directory or file, but of those `seen` already.

        Raises CheckpointError and its kinds, ConfigError.
        """

    def check(self, outline: Outline) -> None:
        """Raise UnsupportedFeatureError for what the format cannot express, before anything is written."""

    def create(self, directory: Path, outline: Outline, limit: int) -> Mapping[str, Target]:
        """Write everything but the numbers into an empty directory; canonical name -> where its numbers go."""


@runtime_checkable
class Lossy(Protocol):
    """A format that loses something of numbers which it can express."""

    def lossy(self, outline: Outline) -> Mapping[str, str]:
        """Canonical name -> what the tensor loses, before anything is written."""


@runtime_checkable
class Moving(Protocol):
    """A format whose layout is not the table's."""

    def layout_of(self, row: Parameter) -> Layout:
        """The layout of a row's tensors, for reports of what is moved."""


def opened_config(path: Path, config: MistralConfig | None) -> Callable[[], MistralConfig]:
    """The config given, or a reader of that beside the weights."""
    directory = path if path.is_dir() else path.parent
    return lambda: config or MistralConfig.from_pretrained(directory)


def texts_in(directory: Path, names: Collection[str] | None = None) -> dict[str, Callable[[], bytes]]:
    """Readers of the `TEXT_FILES` that lie in a directory, and of more chat templates; or of other `names`."""
    names = (*TEXT_FILES, *template_names(directory)) if names is None else names
    return {name: reader(directory / name) for name in names if (directory / name).exists()}


def reader(path: Path) -> Callable[[], bytes]:
    """A reader of a whole small file; raises LimitExceededError."""

    return lambda: reading.read(path, limit=limits.TEXT_BYTES)


def write_texts(directory: Path, texts: Mapping[str, bytes]) -> None:
    """Write tokenizer and generation config under Hugging Face's names."""
    for name, content in texts.items():
        files.write_file(directory / name, content)


def write_hugging_face_config(directory: Path, outline: Outline) -> None:
    """Write config.json of the outline's class and dtype, or of the whole of which it is a part."""
    config = outline.config.replace(architectures=(outline.architecture,), dtype=outline.dtype)
    text = config.to_json_string(with_vision=bool(outline.others))
    if outline.packed:
        linears = [name for name, row in parameters(outline.config, outline.architecture) if row.is_linear]
        told = {"quantization_config": storage.config_of(outline.packed, linears, outline.dtype)}
        text = json.dumps({**json.loads(text), **told}, indent=2) + "\n"
    files.write_file(directory / "config.json", text.encode())


def targets_in_layout(
    infos: Mapping[str, TensorInfo],
    outline: Outline,
    names: Mapping[str, str],
    layout_of: Callable[[Parameter], Layout] = layouts.as_it_is,
) -> dict[str, Target]:
    """Targets at places in files; `infos` is by name in the file, `names` canonical name -> name in the file.

    The outline's `others` have theirs by the names that they have.
    """

    def target(info: TensorInfo, row: Parameter) -> Target:
        layout = layout_of(row)
        return Target(lambda array: tensor_file.write(info, layouts.to_stored(array, row, outline.config, layout)))

    stored = {name: name for name in outline.others} | {name: names.get(name, name) for name in outline.parts()}
    others = {name: Target(functools.partial(tensor_file.write, infos[place])) for name, place in stored.items()}
    return others | {name: target(infos[names[name]], row) for name, row in outline.rows().items()}


def specs_in_layout(
    outline: Outline,
    names: Mapping[str, str],
    layout_of: Callable[[Parameter], Layout] = layouts.as_it_is,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file -> (dtype code, shape in the file), in table order, then packed parts and `others`."""
    own = {
        names[name]: (outline.dtypes[name], layouts.stored_shape(row, outline.config, layout_of(row)))
        for name, row in outline.rows().items()
    }
    parts = {names.get(name, name): spec for name, spec in outline.parts().items()}
    return {**own, **parts, **outline.others}


def refuse_heads(outline: Outline, format: str) -> None:
    """Raise UnsupportedFeatureError unless the class is a language model."""
    if outline.architecture != "MistralForCausalLM":
        raise UnsupportedFeatureError(
            f"{format}: holds language models only, this is a {outline.architecture}; convert it to hf."
        )


def nothing_here(path: Path, expected: str) -> CheckpointNotFoundError:
    """The error for a path without the files of a format."""
    return CheckpointNotFoundError(f"{path} must have {expected}; check the path.")
