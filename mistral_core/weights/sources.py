"""Which files of a repository make a checkpoint: chosen by their names, one format and never two."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..errors import ConversionError, FileNotOnHubError
from . import unread
from .containers.shards import weight_map_of
from .formats import FORMATS, PICKLES, keras_hub
from .formats.base import TEXT_FILES, is_template

CONFIGS = ("config.json", "params.json")
PRESET_FILES = ("metadata.json", "task.json", "preprocessor.json")
"""What a KerasHub preset has beside weights and config."""


HEADS = tuple(dict.fromkeys(name for row in FORMATS.values() for name in row.files))
"""The names that show a format."""


def small_files(names: Collection[str], heads: Collection[str]) -> list[str]:
    """Configs, texts, manifest and indexes: what is fetched before it is known which weights there are."""
    wanted = (*CONFIGS, *TEXT_FILES, "mistral_manifest.json", *(head for head in heads if head.endswith(".json")))
    if any(head.startswith("model.weights.") for head in heads):
        wanted = (*wanted, *PRESET_FILES, *(name for name in names if name.startswith("assets/")))
    wanted = (*wanted, *filter(is_template, names))
    return [name for name in dict.fromkeys(wanted) if name in names]


def heads(names: Collection[str], format: str | None, where: str, *, one: bool = False) -> list[str]:
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
        text = unread.told(names)
        raise FileNotOnHubError(
            f"{where}: has no weights under a name that is known (it has: {_others(names)})"
            f"{f'; {text}' if text else ''}."
        )
    if len(safe) > 1 and (one or "hf" not in safe):
        raise ConversionError(f"{where}: holds {', '.join(safe)}; say which one by format= or --from.")
    return found["hf" if "hf" in safe else safe[0]]


def weight_files(snapshot: Path | None, names: Collection[str], heads: Collection[str]) -> list[str]:
    """The files with numbers that the heads, which are there already if they are indexes, lead to."""
    trees = [head.rpartition("/")[0] or "." for head in heads if head.endswith("_METADATA")]
    if trees:
        return sorted(name for name in names if trees[0] == "." or name.startswith(f"{trees[0]}/"))
    indexes = [head for head in heads if head.endswith(".json")]
    if not indexes:
        return list(heads)
    assert snapshot is not None  # an index is a small file
    index = snapshot / indexes[0]
    if indexes[0] == keras_hub.INDEX:
        return sorted({name for places in keras_hub.weight_map(index).values() for name in places})
    return sorted(set(weight_map_of(index, os.path.splitext(index.name.removesuffix(".index.json"))[1])[0].values()))


def _others(names: Collection[str]) -> str:
    """The weights of a repository, for a message; names out of a listing are data."""
    weights = sorted(n for n in names if n.endswith((".bin", ".pth", ".h5", ".safetensors", ".gguf", ".msgpack")))
    return ", ".join(ascii(name).strip("'")[:100] for name in weights[:10]) or "no weights"
