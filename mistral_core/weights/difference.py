"""Two checkpoints of any formats, compared tensor by tensor, and layer by layer where they are run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..arrays import bits
from ..errors import ConfigError
from ..quantization.matrix import dequantised
from . import fingerprint, lazy
from .contents import Contents
from .matching import canonical_names


class TensorDifference(NamedTuple):
    """One tensor of two checkpoints."""

    name: str
    same_bits: bool
    what: str
    """Empty, or what keeps their numbers from being compared: a tensor that one lacks, other shapes."""
    dtypes: tuple[str, str]
    max_abs: float = 0.0
    max_ulp: float = 0.0
    """In units of the last place of the narrower dtype, at the number."""
    changed: int = 0
    """How many numbers differ; a NaN differs from everything but a NaN."""


class LayerDifference(NamedTuple):
    """The hidden states of two checkpoints after one layer."""

    layer: str
    max_abs: float
    relative: float
    """To the largest hidden state."""


def tensors(first: Contents, second: Contents) -> Iterator[TensorDifference]:
    """Yield a difference for every tensor of either, in the order of the first one's files; one pair in memory."""
    a, b = canonical_names(first.tensors), canonical_names(second.tensors)
    for name in sorted(a, key=lambda name: first.place(a[name])):
        if name not in b:
            yield TensorDifference(name, False, f"only in {first.path}", (first.tensors[a[name]].dtype, ""))
        else:
            yield compared(name, _numbers(first, a[name]), _numbers(second, b[name]))
    for name in sorted(set(b) - set(a)):
        yield TensorDifference(name, False, f"only in {second.path}", ("", second.tensors[b[name]].dtype))


def _numbers(checkpoint: Contents, name: str) -> np.ndarray:
    """A tensor as it is stored, or all that a packed matrix says, in float32."""
    packed = checkpoint.packed(name)
    matrix = None if packed is None else packed.matrix()
    return checkpoint.read(name) if matrix is None else dequantised(matrix)


def compared(name: str, a: np.ndarray, b: np.ndarray) -> TensorDifference:
    """How far two arrays of one name are apart."""
    dtypes = (a.dtype.name, b.dtype.name)
    if a.shape != b.shape:
        return TensorDifference(name, False, f"shapes {a.shape} and {b.shape}", dtypes)
    if a.dtype == b.dtype and np.array_equal(bits(a), bits(b)):
        return TensorDifference(name, True, "", dtypes)
    narrow = min(a.dtype, b.dtype, key=lambda dtype: ml_dtypes.finfo(dtype).nmant)
    x, y = a.astype(np.float64), b.astype(np.float64)
    changed = (x != y) & ~(np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        distance = np.where(changed, np.abs(x - y), 0.0)
    if not changed.any():
        return TensorDifference(name, False, "", dtypes)
    info = ml_dtypes.finfo(narrow)
    with np.errstate(invalid="ignore", over="ignore"):
        exponent = np.maximum(np.frexp(np.maximum(np.abs(x), np.abs(y)))[1] - 1, info.minexp)
        ulp = distance * np.ldexp(1.0, info.nmant - exponent)
    largest = float(np.nan_to_num(distance, nan=np.inf).max())
    return TensorDifference(
        name, False, "", dtypes, largest, float(np.nan_to_num(ulp, nan=np.inf).max()), int(changed.sum())
    )


def layers(first: Contents, second: Contents, ids: np.ndarray) -> Iterator[LayerDifference]:
    """Yield how far the hidden states of ids [B, T] part, after the embeddings, each layer and the last norm.

    Both run in the float64 reference. Raises ConfigError where the two do not have the same layers.
    """
    if first.config.num_hidden_layers != second.config.num_hidden_layers:
        raise ConfigError(
            f"{first.path} has {first.config.num_hidden_layers} layers, {second.path} "
            f"{second.config.num_hidden_layers}; compare models of one depth."
        )
    names = ["embeddings", *(f"layer {i}" for i in range(first.config.num_hidden_layers)), "norm"]
    pairs = zip(
        fingerprint.layer_states(first.config, lazy.arrays(first, np.float64), ids),
        fingerprint.layer_states(second.config, lazy.arrays(second, np.float64), ids),
        strict=True,
    )
    for name, (x, y) in zip(names, pairs, strict=True):
        distance = float(np.abs(x - y).max())
        yield LayerDifference(name, distance, distance / max(float(np.abs(x).max()), 1e-300))
