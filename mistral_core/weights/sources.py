"""Which files of a repository make a checkpoint: chosen by their names, one format and never two."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..compat import unread
from ..disk.files import PathLike, check_bare_name
from ..disk.into import MANIFEST
from ..disk.names import CONFIG_FILES, TEXT_FILES, VISION_FILES, is_template
from ..errors import ConversionError, FileNotOnHubError
from ..hub import download
from .containers.shards import weight_map_of
from .formats import FORMATS, PICKLES, keras_hub

PRESET_FILES = ("metadata.json", "task.json", "preprocessor.json")
"""What a KerasHub preset has beside weights and config."""

TELLING_FILES = tuple(dict.fromkeys(name for row in FORMATS.values() for name in row.files))
"""The names that show a format."""


def resolve_checkpoint(
    path_or_id: PathLike,
    *,
    format: str | None = None,
    one_format: bool = False,
    file: str | None = None,
    **hub_arguments: Any,
) -> Path:
    """The local path of a checkpoint: a path itself, or a hub id's configs, tokenizers and weights of one format.

    That is `format`, else the one that is there, `hf` of several unless there should be `one_format`; or one `file` of
    it, since a repository may hold a GGUF of each size. Raises
    CheckpointNotFoundError (for a path), ConversionError (several formats), HubError and its kinds.
    """
    if file is not None:
        check_bare_name(file, "gguf_file")
        return download.resolve(path_or_id, (file,), **hub_arguments) / file
    return download.resolve(path_or_id, CheckpointFiles(format, one_format), **hub_arguments)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a repository that make a checkpoint of one format."""

    format: str | None
    one_format: bool

    asked: ClassVar = (*CONFIG_FILES, *TELLING_FILES)
    told: ClassVar = CONFIG_FILES

    @property
    def rest_is(self) -> str:
        """What `rest` is, for a message."""
        return "weights" if self.format is None else f"weights of the format {self.format}"

    def first(self, names: Collection[str], where: str) -> list[str]:
        """Configs, texts, manifest and indexes: what is fetched before it is known which weights there are."""
        telling = telling_files(names, self.format, where, one=self.one_format)
        wanted = (*CONFIG_FILES, *TEXT_FILES, *VISION_FILES, MANIFEST, *(n for n in telling if n.endswith(".json")))
        if any(name.startswith("model.weights.") for name in telling):
            wanted = (*wanted, *PRESET_FILES, *(name for name in names if name.startswith("assets/")))
        wanted = (*wanted, *filter(is_template, names))
        return [name for name in dict.fromkeys(wanted) if name in names]

    def rest(self, names: Collection[str], where: str, snapshot: Path) -> list[str]:
        """The files with numbers that the telling files, which are there already if they are indexes, lead to."""
        return weight_files(snapshot, names, telling_files(names, self.format, where, one=self.one_format))


def telling_files(names: Collection[str], format: str | None, where: str, *, one: bool = False) -> list[str]:
    """The files that show a format: its single file, its index, or the metadata of its tree.

    Without a format it is the one that is there, `hf` of several unless there should be `one`, and a pickle only where
    nothing else is. Raises FileNotOnHubError where there is none, ConversionError where there are several others.
    """
    found = {row.name: [name for name in row.files if name in names] for row in FORMATS.values()}
    found = {name: files for name, files in found.items() if files}
    if format is not None:
        # Flax and TensorFlow have the names of Hugging Face's files, and keras-hub those of Keras
        shared = {"flax-safetensors": "hf", "tf-safetensors": "hf"}.get(format, format)
        chosen = found.get(shared) or (found.get("keras") if format == "keras-hub" else None)
        if not chosen:
            raise FileNotOnHubError(f"{where}: has nothing of the format {format} (it has: {_others(names)}).")
        return chosen
    safe = [name for name in found if name not in PICKLES] or list(found)
    if not safe:
        text = unread.advice(names)
        raise FileNotOnHubError(
            f"{where}: has no weights under a name that is known (it has: {_others(names)})"
            f"{f'; {text}' if text else ''}."
        )
    if len(safe) > 1 and (one or "hf" not in safe):
        raise ConversionError(f"{where}: holds {', '.join(safe)}; say which one by format= or --from.")
    return found["hf" if "hf" in safe else safe[0]]


def weight_files(snapshot: Path | None, names: Collection[str], telling: Collection[str]) -> list[str]:
    """The files with numbers that the telling files, which are there already if they are indexes, lead to."""
    trees = [head.rpartition("/")[0] or "." for head in telling if head.endswith("_METADATA")]
    if trees:
        return sorted(name for name in names if trees[0] == "." or name.startswith(f"{trees[0]}/"))
    indexes = [head for head in telling if head.endswith(".json")]
    if not indexes:
        return list(telling)
    assert snapshot is not None  # an index is a small file
    index = snapshot / indexes[0]
    if indexes[0] == keras_hub.INDEX:
        return sorted({name for places in keras_hub.weight_map(index).values() for name in places})
    return sorted(set(weight_map_of(index, os.path.splitext(index.name.removesuffix(".index.json"))[1])[0].values()))


def _others(names: Collection[str]) -> str:
    """The weights of a repository, for a message; names out of a listing are data."""
    weights = sorted(n for n in names if n.endswith((".bin", ".pth", ".h5", ".safetensors", ".gguf", ".msgpack")))
    return ", ".join(ascii(name).strip("'")[:100] for name in weights[:10]) or "no weights"
