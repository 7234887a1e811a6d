"""Quantised checkpoints: the parts of each packed matrix become one float tensor; all others pass as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import MistralConfig
from ..disk import strict_json
from ..errors import CheckpointError, ConfigError, CorruptCheckpointError, LossyConversionError, TensorMismatchError
from ..quantization.ints import AWQ, GPTQ
from ..quantization.matrix import PackedMatrix, check, in_order
from ..quantization.nf4 import NF4
from ..quantization.packings import PACKED_WORDS, ROWS, Packing, Parts, scaled
from ..quantization.schemes import Scheme, Schemes
from .containers.tensor_file import CODES, DTYPES, TensorFile, TensorInfo, quoted
from .contents import Packed, StoredTensor

PACKINGS: dict[str, Packing] = {"awq": AWQ, "gptq": GPTQ, "nf4": NF4, "packed": PACKED_WORDS}

_OF_ACTIVATIONS = frozenset(
    {
        "activation_scale",
        "input_scale",
        "input_zero_point",
        "k_scale",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "qscale_act",
        "v_scale",
    }
)
"""The last part of names of numbers that no weight depends on."""


def dequantised(
    shards: list[TensorFile],
    described: Path,
    key: str,
    read: Any,
    config: Callable[[], MistralConfig],
    *,
    left_out: Collection[str] = (),
) -> list[TensorFile]:
    """Opened files, or one view of them in which packed matrices are float tensors and some names are `left_out`.

    `read` makes schemes of what stands under a key in a JSON file; without that, nothing is done. The floats are of
    the config's dtype, or float32. Raises ConfigError, TensorMismatchError and its kinds, CorruptCheckpointError.
    """
    infos = (info for shard in shards for name, info in shard.tensors.items() if name not in left_out)
    packed = any(info.dtype not in DTYPES for info in infos)
    if not packed or not described.exists():
        return shards
    data = strict_json.read_object(described, error=ConfigError)
    if data.get(key) is None:
        return shards
    schemes = read(data[key], where=str(described))
    codes = {dtype.name: code for dtype, code in CODES.items()}
    return [Dequantised(shards, schemes, codes.get(str(config().dtype), "F32"), left_out)]


def labelled(tensors: Mapping[str, StoredTensor], files: Iterable[TensorFile]) -> dict[str, StoredTensor]:
    """The tensors of such files, each packed one with its parts and what it lost."""
    views = {name: file for file in files if isinstance(file, Dequantised) for name in file.matrices}

    def found(tensor: StoredTensor) -> StoredTensor:
        view = views.get(tensor.name)
        return tensor if view is None else view.told(tensor)

    return {name: found(tensor) for name, tensor in tensors.items()}


class _Matrix(NamedTuple):
    """A packed matrix of some files."""

    parts: Parts
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def packing(self) -> Packing:
        return packing_of(self.scheme)


def packing_of(scheme: Scheme) -> Packing:
    """How a scheme packs a matrix."""
    return scaled(scheme) if scheme.packing == "scaled" else PACKINGS[scheme.packing]


class Dequantised(TensorFile):
    """Several files as one, in which packed matrices are float tensors."""

    def __init__(self, shards: list[TensorFile], schemes: Schemes, code: str, left_out: Collection[str] = ()) -> None:
        """Check the headers of every matrix' parts; of the numbers, only shapes are read."""
        self.code = code
        self.path, self.metadata, self.stamp = shards[0].path, {}, shards[0].stamp
        self.owners = {name: shard for shard in shards for name in shard.tensors if name not in left_out}
        self.matrices: dict[str, _Matrix] = {}
        taken = set[str]()
        markers: dict[str, list[Scheme]] = {}
        for scheme in schemes:
            markers.setdefault(packing_of(scheme).parts[0], []).append(scheme)
        for name in self.owners:
            for marker, possible in markers.items():
                if name.endswith(f".{marker}"):
                    matrix = self._matrix(name.removesuffix(f".{marker}"), possible)
                    self.matrices[f"{matrix.parts.base}.weight"] = matrix
                    taken |= {info.name for info in matrix.parts.infos.values()}
        self.tensors = {
            name: shard.tensors[name]
            for name, shard in self.owners.items()
            if name not in taken and name.rpartition(".")[2] not in _OF_ACTIVATIONS
        }
        twice = sorted(quoted(name) for name in self.matrices if name in self.tensors)
        if twice:
            raise CorruptCheckpointError(f"{self.path}: holds {', '.join(twice)} both packed and as they are.")
        self.tensors |= {name: self._info(name, matrix) for name, matrix in self.matrices.items()}

    def _matrix(self, base: str, possible: list[Scheme]) -> _Matrix:
        """A matrix under the one of the possible schemes that its parts fit; raises what the nearest finds."""
        wrong: list[CheckpointError] = []
        for scheme in possible:
            names = {part: f"{base}.{part}" for part in packing_of(scheme).parts}
            infos = {part: self.owners[name].tensors[name] for part, name in names.items() if name in self.owners}
            parts = Parts(base, infos, functools.partial(self._read_part, base))
            try:
                return _Matrix(parts, scheme, packing_of(scheme).shape(parts, scheme))
            except (TensorMismatchError, CorruptCheckpointError) as error:
                wrong.append(error)
        # codes of another size are of another scheme; any other part that is wrong is of the right one
        raise next((error for error in wrong if isinstance(error, TensorMismatchError)), wrong[0])

    def _read_part(self, base: str, part: str) -> np.ndarray:
        name = f"{base}.{part}"
        return self.owners[name].read_packed(name)

    def _info(self, name: str, matrix: _Matrix) -> TensorInfo:
        """A tensor said to lie where the largest of its parts does."""
        largest = max(matrix.parts.infos.values(), key=lambda info: info.nbytes)
        return largest._replace(name=name, dtype=self.code, shape=matrix.shape)

    def told(self, tensor: StoredTensor) -> StoredTensor:
        """A tensor with what is known of its packing."""
        parts, scheme, _ = matrix = self.matrices[tensor.name]
        packed = Packed(scheme, parts, functools.partial(_in_order, matrix, tensor))
        return tensor._replace(packed=packed, loss=f"dequantised from {scheme.label}")

    def read(self, name: str, rows: slice | None = None, *, cached: bool = True) -> np.ndarray:
        """A fresh array, or some of its rows.

        Raises what reading its parts raises, LossyConversionError for values beyond the dtype.
        """
        if name not in self.matrices:
            return self.owners[name].read(name, rows, cached=cached)
        matrix, info = self.matrices[name], self.tensors[name]
        parts = matrix.parts
        unpack = matrix.packing.rows(parts, matrix.scheme, matrix.shape)
        first, last, _ = (rows or slice(None)).indices(info.shape[0])
        result = np.empty((max(last - first, 0), info.shape[1]), DTYPES[info.dtype])
        try:
            with np.errstate(over="raise", invalid="ignore", under="ignore"):
                for start in range(first - first % ROWS, last, ROWS):  # packed words hold several rows
                    stop = min(start + ROWS, info.shape[0])
                    wanted = slice(max(start, first), min(stop, last))
                    numbers = unpack(slice(start, stop))
                    result[wanted.start - first : wanted.stop - first] = numbers[
                        wanted.start - start : wanted.stop - start
                    ]
        except FloatingPointError as cause:
            raise LossyConversionError(
                f"{parts.where}: values beyond {result.dtype.name}; say bfloat16 or float32 in the config's dtype."
            ) from cause
        return result


def _in_order(matrix: _Matrix, tensor: StoredTensor) -> PackedMatrix | None:
    """A matrix in few bits with its rows in the table's order, checked, or None where it is no such matrix."""
    found = matrix.packing.matrix(matrix.parts, matrix.scheme, matrix.shape)
    if found is None or (tensor.moves and tensor.order is None):
        return None
    check(found, matrix.parts.where)
    return found if tensor.order is None else in_order(found, tensor.order())
