"""An adapter as llama.cpp reads it: one GGUF file, loaded beside that of the base.

llama.cpp adds alpha / r times B A to a matrix, of each its own r and of all one alpha. Where a scaling is another, by
rsLoRA or by a pattern, B is multiplied by the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import MistralConfig
from ..disk import files
from ..errors import NonFiniteWeightsError, UnsupportedFeatureError
from ..parameters import layer_of
from ..weights.containers import tensor_file
from ..weights.containers.gguf import file as gguf_file
from ..weights.containers.gguf.scan import ALIGNMENT, DEFAULT_ALIGNMENT, Value
from ..weights.formats.gguf import config as gguf_config
from ..weights.formats.gguf import layout_of
from ..weights.layouts import row_order
from ..weights.matching import canonical_names, own_class
from ..weights.opening import Checkpoint
from .adapter import LoraWeights
from .config import LoraTarget
from .merging import EMBEDDING, Merging

FILE = "adapter.gguf"
ALPHA = "adapter.lora.alpha"
CAUSAL = "MistralForCausalLM"
_MERGE = "fold it in with `mistral lora merge`, and convert the result to gguf"


def write(
    base: files.PathLike,
    adapter: files.PathLike,
    destination: files.PathLike,
    *,
    overwrite: bool = False,
    **hub_arguments: Any,
) -> Path:
    """Write the adapter of a directory for llama.cpp, as `adapter.gguf` in a directory, and say where it is.

    `base` is a checkpoint of any format, a GGUF file too, or a hub id; of its tensors are read only those that the
    adapter holds as well. The directory is the old one or the new one, and what else is in it stays.
    Raises UnsupportedFeatureError for what llama.cpp does not compute (DoRA, modules saved whole, an embedding that is
    the head too), NonFiniteWeightsError, OutputExistsError unless `overwrite`, what `adapter.load` raises, HubError,
    CheckpointError, ConversionError and their kinds.
    """
    folder, checkpoint = files.as_path(adapter), Checkpoint.open(base, **hub_arguments)
    names = canonical_names(checkpoint.tensors)
    architecture = own_class(checkpoint.config, names)
    if architecture != CAUSAL:
        raise UnsupportedFeatureError(
            f"{checkpoint.path} must be a language model, for a GGUF file holds no other, got a {architecture}; load "
            "the adapter beside it in a framework."
        )
    merging = Merging(folder, checkpoint.config, architecture)
    _check(merging, folder)
    _check_base(merging, checkpoint, names, folder)
    alpha = _alpha(merging.adapter.config.lora_alpha)
    tensors = dict(_tensors(merging, checkpoint.config, alpha))
    with files.atomic_directory(destination, overwrite=overwrite, replaces=(FILE,)) as temporary:
        specs = {name: ("F32", array.shape) for name, array in tensors.items()}
        for name, info in gguf_file.create(temporary / FILE, _values(checkpoint, alpha), specs).items():
            tensor_file.write(info, tensors[name])
    return files.as_path(destination) / FILE


# What llama.cpp does not compute


def _check(merging: Merging, path: Path) -> None:
    """Raise UnsupportedFeatureError for an adapter that is more than products of two matrices, each beside its own."""
    lora = merging.adapter.config
    if lora.use_dora:
        raise UnsupportedFeatureError(f"{path}: use_dora must be false, llama.cpp computes no DoRA; {_MERGE}.")
    if merging.adapter.saved:
        raise UnsupportedFeatureError(
            f"{path}: modules_to_save must be empty, got {', '.join(lora.modules_to_save or ())}; an adapter of "
            f"llama.cpp replaces no tensor: {_MERGE}."
        )
    if merging.unties:
        raise UnsupportedFeatureError(
            f"{path}: target_modules must not have embed_tokens where that is the head too, for llama.cpp takes it for "
            f"an adapter of the head, and aborts; {_MERGE}."
        )


def _check_base(merging: Merging, checkpoint: Checkpoint, names: dict[str, str], path: Path) -> None:
    """Raise UnsupportedFeatureError where peft wrote tensors of the base that are not those of this base."""
    for name, array in merging.adapter.base.items():
        if not np.array_equal(checkpoint.read(names[name]).astype(np.float32), array):
            raise UnsupportedFeatureError(
                f"{path}: holds {name} of the base, which must be that of {checkpoint.path}, and is another; give the "
                f"base that it was trained on, or {_MERGE}."
            )


# What is written


def _alpha(alpha: float) -> np.float32:
    """The alpha of the file; where float32 has none, 0, which is to llama.cpp a scaling of 1."""
    with np.errstate(over="ignore"):
        rounded = np.float32(alpha)
    return rounded if np.isfinite(rounded) else np.float32(0)


def _values(checkpoint: Checkpoint, alpha: np.float32) -> dict[str, Value | list[str]]:
    """The keys; llama.cpp wants the base's own architecture, which a GGUF file says and others get by their config."""
    own = next(iter(checkpoint.shards.values())).metadata.get(gguf_config.ARCHITECTURE)
    if checkpoint.format != "gguf" or own is None:
        own = gguf_config.architecture(checkpoint.config)
    return {
        gguf_config.ARCHITECTURE: own,
        "general.type": "adapter",
        "general.name": "Mistral",
        "general.file_type": np.uint32(0),
        ALIGNMENT: np.uint32(DEFAULT_ALIGNMENT),
        "adapter.type": "lora",
        ALPHA: alpha,
    }


def _tensors(merging: Merging, config: MistralConfig, alpha: np.float32) -> Iterator[tuple[str, Array]]:
    """(name, array) of each A and B; raises NonFiniteWeightsError."""
    for name, target in merging.targets.items():
        a, b = _scaled(merging.adapter.weights[name], target, alpha)
        stem = str(target.row.gguf).format(layer_of(name))
        if name == EMBEDDING:  # llama.cpp looks rows up in A [V, r], and multiplies them with B [D, r]
            a, b = b, np.ascontiguousarray(a.T)
        elif layout_of(target.row).interleaved:
            rows = np.empty_like(b)
            rows[row_order(target.row, config, layout_of(target.row))] = b
            b = rows
        yield f"{stem}.lora_a", a
        yield f"{stem}.lora_b", b


def _scaled(low: LoraWeights, target: LoraTarget, alpha: np.float32) -> tuple[Array, Array]:
    """A [r, I], and B [O, r] multiplied by what llama.cpp's own scaling lacks, rounded once."""
    missing = target.scaling * target.r / float(alpha) if alpha else target.scaling
    with np.errstate(over="ignore"):
        b = (missing * low.b.astype(np.float64)).astype(np.float32)
    if not np.isfinite(b).all():
        raise NonFiniteWeightsError(
            f"{target.name}: B times {missing:g}, for llama.cpp has one alpha, must be finite in float32; give the "
            "adapter scalings that are nearer to each other."
        )
    return low.a, b
