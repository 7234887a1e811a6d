"""A checkpoint of any format as what a class needs of it: its config, and a stream of (canonical name, array)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..config import MistralConfig
from ..disk import files, reading
from ..errors import (
    DtypeMismatchError,
    LossyConversionError,
    UnsupportedFeatureError,
)
from ..generation import GenerationConfig
from ..hub import download
from ..parameters import HEADS, LM_HEAD, Parameter, initial_value, parameters, shapes
from ..quantization import request
from ..quantization.matrix import PackedMatrix
from ..quantization.request import Quantization
from ..telling import warn
from . import casting, manifest, towers
from .containers.tensor_file import DTYPES
from .contents import Packed, fits_in_cache
from .matching import EMBEDDING, canonical_names, match
from .opening import Checkpoint
from .sources import resolve_checkpoint

GENERATION_FILE = "generation_config.json"
DEQUANTIZE = "dequantize"
"""What `quantization` says where packed matrices are to become floats."""


def load(
    path: files.PathLike | Checkpoint,
    architecture: str = "MistralForCausalLM",
    *,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    verify: str = "sizes",
    seed: int = 0,
    **hub_arguments: Any,
) -> tuple[MistralConfig, Iterator[tuple[str, np.ndarray]]]:
    """Match a checkpoint, opened or at a path, to a class; gives the config and a stream of (canonical name, array).

    New heads come first, the others in the order of the files, which is the fastest to read. All is checked here,
    before the stream gives its first tensor, except what only values can tell: overflow in a cast to `dtype`
    (None: as stored). `verify` is a mode of `manifest.verify`, `seed` is for a new head, `hub_arguments` are
    `hub.download.ARGUMENTS`.
    Raises CheckpointError and its kinds, ConfigError, HubError; the stream LossyConversionError.
    """
    check_architecture(architecture)
    target = dtype_of(dtype) if dtype is not None else None
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path, config=config, **hub_arguments)
    config, weights = _load(checkpoint, architecture, config, target, verify, seed, DEQUANTIZE)
    return config, ((weight.name, weight.read()) for weight in weights)


def _load(
    checkpoint: Checkpoint,
    architecture: str,
    config: MistralConfig | None,
    target: np.dtype | None,
    verify: str,
    seed: int,
    asked: Quantization | str | None,
) -> tuple[MistralConfig, Iterator[Weight]]:
    config = checkpoint.config if config is None else MistralConfig.of(config)
    manifest.verify(checkpoint.directory, verify)
    where = str(checkpoint.path)
    _tell_of_packing(checkpoint, asked, where)
    if checkpoint.skipped:
        left_out = towers.told(towers.counted(checkpoint.skipped, checkpoint.format))
        warn(f"{where}: {left_out} are not read: this is the text part of a model that also sees.")
    sources = match(checkpoint.tensors, config, architecture, read=checkpoint.read, where=where)
    weights = _weights(checkpoint, config, architecture, sources, target, seed, keep_packed=asked is None)
    if isinstance(asked, Quantization):
        resolved = asked.resolved(config, architecture)
        wanted = frozenset(resolved.matrices(config, architecture))
        weights = (_quantised(weight, resolved) if weight.name in wanted else weight for weight in weights)
    return config, weights


def _tell_of_packing(checkpoint: Checkpoint, asked: Quantization | str | None, where: str) -> None:
    """Say what is packed and what becomes of it; raises ConfigError where it should be packed once more."""
    losses, packed = checkpoint.losses, ", ".join(checkpoint.schemes)
    if isinstance(asked, Quantization):
        checkpoint.check_floats()
    if packed and asked is None:
        warn(f"{where}: packed ({packed}), and kept so; quantization='dequantize' makes floats of it.")
        losses = tuple(sorted({t.loss for t in checkpoint.tensors.values() if t.loss and t.packed is None}))
    if losses:
        warn(f"{where}: {'; '.join(losses)}.")


def _quantised(weight: Weight, asked: Quantization) -> Weight:
    return weight._replace(matrix=lambda: asked.quantise(weight.name, weight.read()))


class Weight(NamedTuple):
    """A tensor of a class, read when it is asked for: in few bits, or as floats, whole or what one device holds."""

    name: str
    """Canonical."""
    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]
    """All of it, or the part at an index, as `Contents.read` takes one; raises LossyConversionError."""
    matrix: Callable[[], PackedMatrix | None] = lambda: None
    """The matrix in few bits, where the files have it so, or it is asked for; else None, and it is read as floats."""


class Pretrained(NamedTuple):
    """A checkpoint as a class wants it."""

    config: MistralConfig
    """With the overrides, and the dtype the tensors come in."""
    generation_config: GenerationConfig
    weights: Iterator[Weight]
    """Each tensor once, in the order that is the fastest to read."""
    activations: str | None = None
    """int8: what packed integers meet is to be rounded."""

    @property
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, array), one at a time."""
        return ((weight.name, weight.read()) for weight in self.weights)


def load_pretrained(
    path: files.PathLike,
    architecture: str,
    *,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    seed: int = 0,
    verify: str = "sizes",
    quantization: Any = None,
    **options: Any,
) -> Pretrained:
    """Open a checkpoint for a class; `options` are hub arguments, `gguf_file` and fields of the config to replace.

    All tensors come in `dtype`, or in the embedding's own. `quantization` is what `request.of` reads: each matrix is
    packed as it comes; None leaves packed ones packed and "dequantize" makes floats of them. Raises what `load`
    raises, and UnknownFieldError.
    """
    asked = quantization if quantization == DEQUANTIZE else request.of(quantization)
    config = None if config is None else MistralConfig.of(config)
    hub_arguments = {key: options.pop(key) for key in download.ARGUMENTS if key in options}
    root = resolve_checkpoint(path, file=options.pop("gguf_file", None), **hub_arguments)

    def loaded(root: Path) -> Pretrained:
        opened = Checkpoint.open(root, config=config)
        return _loaded(opened, architecture, config, dtype, seed, verify, asked, options)

    return reading.of_one_moment(root, loaded)


def _loaded(
    opened: Checkpoint,
    architecture: str,
    config: MistralConfig | None,
    dtype: str | None,
    seed: int,
    verify: str,
    asked: Quantization | str | None,
    options: Mapping[str, Any],
) -> Pretrained:
    """Everything from one opened checkpoint, whose directory is held: config, generation config and tensors agree."""
    directory, config = opened.directory, (config or opened.config).overridden(**options)
    embedding = canonical_names(opened.tensors).get(EMBEDDING)
    if dtype is None and embedding is not None and opened.tensors[embedding].dtype in DTYPES:
        dtype = opened.dtype(embedding).name
    check_architecture(architecture)
    target = dtype_of(dtype) if dtype else None
    config, weights = _load(opened, architecture, config, target, verify, seed, asked)
    generation = GenerationConfig.from_model_config(config)
    if (directory / GENERATION_FILE).exists():
        generation = GenerationConfig.from_pretrained(directory)
    activations = asked.activations if isinstance(asked, Quantization) else None
    return Pretrained(config.replace(dtype=dtype), generation, weights, activations)


def _weights(
    checkpoint: Checkpoint,
    config: MistralConfig,
    architecture: str,
    sources: Mapping[str, str | None],
    target: np.dtype | None,
    seed: int,
    *,
    keep_packed: bool,
) -> Iterator[Weight]:
    embedding = sources[EMBEDDING]
    assert embedding is not None  # only heads are initialised
    like = target or checkpoint.dtype(embedding)
    stored = [(source, name) for name, source in sources.items() if source is not None]
    cached = fits_in_cache(sum(checkpoint.tensors[source].nbytes for source, _ in stored))
    sizes, rows = shapes(config, architecture), dict(parameters(config, architecture))

    def made(name: str, row: Parameter, index: Any = ()) -> np.ndarray:
        return cast(initial_value(name, row, config, seed=seed)[index], like, name)

    def read(source: str, name: str, index: Any = None) -> np.ndarray:
        # no name for the array: it would keep one tensor too many alive
        return cast(checkpoint.read(source, index, cached=cached), target or checkpoint.dtype(source), name)

    told = set[str]()

    def packed_or_told(packed: Packed, name: str) -> PackedMatrix | None:
        """A matrix that is to stay packed, and once for each scheme a warning that some cannot."""
        matrix = packed.matrix() if rows[name].is_of_layer or name == LM_HEAD else None
        if matrix is None and packed.scheme.label not in told:
            told.add(packed.scheme.label)
            warn(
                f"{checkpoint.path}: {name} cannot stay packed as {packed.scheme.label} arranges it and becomes "
                "floats, as do others like it, with the memory that floats take; for few bits, quantize the checkpoint "
                "that it was made of."
            )
        return matrix

    for name, row in rows.items():
        if sources[name] is None:
            yield Weight(name, sizes[name], functools.partial(made, name, row))
    for source, name in sorted(stored, key=lambda pair: checkpoint.place(pair[0])):
        weight = Weight(name, sizes[name], functools.partial(read, source, name))
        packed = checkpoint.packed(source) if keep_packed else None
        yield weight if packed is None else weight._replace(matrix=functools.partial(packed_or_told, packed, name))


def check_architecture(name: str) -> None:
    if name not in HEADS:
        raise UnsupportedFeatureError(f"architecture must be one of {', '.join(HEADS)}, got {name!r}.")


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of `bfloat16`, `float16`, `float32` or `float64`; DtypeMismatchError for others."""
    for dtype in DTYPES.values():
        if dtype.name == name:
            return dtype
    raise DtypeMismatchError(f"dtype must be one of {', '.join(d.name for d in DTYPES.values())}, got {name!r}.")


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Round an array to the nearest values of a dtype; LossyConversionError where one becomes infinite."""
    if array.dtype == dtype:
        return array
    result = casting.rounded(array, dtype)
    narrower = ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max
    with np.errstate(invalid="ignore"):  # a signalling NaN
        overflown = np.count_nonzero(np.isinf(result) & ~np.isinf(array)) if narrower else 0
    if overflown:
        raise LossyConversionError(
            f"{name}: {overflown} values are beyond {dtype.name}; load it as bfloat16 or float32."
        )
    return result
