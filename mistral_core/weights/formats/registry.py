"""The table of formats: one row each, and what opens and writes it.

A new format is what `base.Format` describes and a row here; it may lie in another package that registers it at the
entry point `mistral.formats`.
"""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint
from typing import NamedTuple

from ... import extras
from ...errors import ConversionError
from .base import Format

GROUP = "mistral.formats"


class Row(NamedTuple):
    """A format: its name, what it is, the files that show it is there, what opens it, what must be installed."""

    name: str
    summary: str
    files: tuple[str, ...]
    place: str | None
    """A module of this package, or an object in one; None where another package registers it."""
    extra: str | None = None
    written: bool = True


def _with_index(*names: str) -> tuple[str, ...]:
    return tuple(each for name in names for each in (name, f"{name}.index.json"))


FORMATS = {
    row.name: row
    for row in (
        Row("hf", "Hugging Face safetensors", _with_index("model.safetensors"), ".sharded:HF"),
        Row("raw", "Mistral's own: consolidated.safetensors", _with_index("consolidated.safetensors"), ".sharded:RAW"),
        Row("flax-msgpack", "transformers' Flax", _with_index("flax_model.msgpack"), ".sharded:FLAX_MSGPACK"),
        Row("flax-safetensors", "transformers' Flax, in safetensors", (), ".sharded:FLAX_SAFETENSORS"),
        Row("tf-h5", "transformers' TensorFlow", _with_index("tf_model.h5"), ".tf_h5", "convert"),
        Row("tf-safetensors", "transformers' TensorFlow, in safetensors", (), ".sharded:TF_SAFETENSORS"),
        Row("keras-hub", "a KerasHub preset", ("model.weights.json",), ".keras_hub", "convert"),
        Row("keras", "our Keras models", ("model.keras", "model.weights.h5"), ".keras", "convert"),
        Row("orbax", "our Flax parameters in Orbax", ("params/_METADATA", "_METADATA"), ".orbax", "orbax"),
        Row("maxtext", "MaxText's tree in Orbax", ("0/items/_METADATA", "items/_METADATA"), ".maxtext", "orbax"),
        Row("gguf", "GGUF, architecture llama", ("model.gguf",), ".gguf", "convert"),
        Row("hf-bin", "pytorch_model.bin", _with_index("pytorch_model.bin"), None, "torch", written=False),
        Row("raw-pth", "consolidated.NN.pth", ("consolidated.00.pth",), None, "torch", written=False),
    )
}
"""In the order in which they are looked for; the last two are pickles, taken only where nothing else is there."""

PICKLES = ("hf-bin", "raw-pth")


def format_named(name: str) -> Format:
    """What opens and writes a format; raises ConversionError for an unknown name, MissingExtraError."""
    if name not in FORMATS:
        raise ConversionError(f"format must be one of {', '.join(FORMATS)}, got {name!r}.")
    row = FORMATS[name]
    try:
        found: Format = _entry_point(row).load()
        return found
    except ImportError as cause:
        if row.extra is None:
            raise
        raise extras.missing(f"the format {name}", cause.name or str(cause), row.extra) from cause


def _entry_point(row: Row) -> EntryPoint:
    if row.place is not None:
        return EntryPoint(row.name, f"{__package__}{row.place}", GROUP)
    for point in importlib.metadata.entry_points(group=GROUP, name=row.name):
        return point
    raise ImportError(f"no entry point {row.name} in {GROUP}")
