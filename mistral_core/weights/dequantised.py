"""Quantised checkpoints: the parts of each packed matrix become one float tensor; all others pass as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..disk import strict_json
from ..errors import ConfigError, CorruptCheckpointError, LossyConversionError
from ..quantization import Scheme
from ..quantization.ints import AWQ, GPTQ
from ..quantization.nf4 import NF4
from ..quantization.packings import PACKED_WORDS, ROWS, Packing, Parts, scaled
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

    `read` makes a scheme of what stands under a key in a JSON file; without that, nothing is done. The floats are of
    the config's dtype, or float32. Raises ConfigError, TensorMismatchError and its kinds, CorruptCheckpointError.
    """
    infos = (info for shard in shards for name, info in shard.tensors.items() if name not in left_out)
    packed = any(info.dtype not in DTYPES for info in infos)
    if not packed or not described.exists():
        return shards
    data = strict_json.read_object(described, error=ConfigError)
    if data.get(key) is None:
        return shards
    scheme = read(data[key], where=str(described))
    codes = {dtype.name: code for dtype, code in CODES.items()}
    return [Dequantised(shards, scheme, codes.get(str(config().dtype), "F32"), left_out)]


def labelled(tensors: Mapping[str, StoredTensor], files: Iterable[TensorFile]) -> dict[str, StoredTensor]:
    """The tensors of such files, each packed one with its parts and what it lost."""
    packed = {name: each for file in files if isinstance(file, Dequantised) for name, each in file.packed.items()}

    def found(tensor: StoredTensor) -> StoredTensor:
        parts = packed.get(tensor.name)
        return tensor if parts is None else tensor._replace(packed=parts, loss=f"dequantised from {parts.scheme.label}")

    return {name: found(tensor) for name, tensor in tensors.items()}


class Dequantised(TensorFile):
    """Several files as one, in which packed matrices are float tensors."""

    def __init__(self, shards: list[TensorFile], scheme: Scheme, code: str, left_out: Collection[str] = ()) -> None:
        """Check the headers of every matrix' parts; of the numbers, only shapes are read."""
        self.scheme, self.code = scheme, code
        self.packing = scaled(scheme) if scheme.packing == "scaled" else PACKINGS[scheme.packing]
        self.path, self.metadata, self.stamp = shards[0].path, {}, shards[0].stamp
        self.owners = {name: shard for shard in shards for name in shard.tensors if name not in left_out}
        self.matrices: dict[str, Parts] = {}
        marker, taken = f".{self.packing.parts[0]}", set[str]()
        for name in self.owners:
            if name.endswith(marker):
                parts = self._parts(name.removesuffix(marker))
                self.matrices[f"{parts.base}.weight"] = parts
                taken |= {info.name for info in parts.infos.values()}
        self.tensors = {
            name: shard.tensors[name]
            for name, shard in self.owners.items()
            if name not in taken and name.rpartition(".")[2] not in _OF_ACTIVATIONS
        }
        twice = sorted(quoted(name) for name in self.matrices if name in self.tensors)
        if twice:
            raise CorruptCheckpointError(f"{self.path}: holds {', '.join(twice)} both packed and as they are.")
        self.tensors |= {name: self._info(name, parts) for name, parts in self.matrices.items()}

    @property
    def packed(self) -> dict[str, Packed]:
        """Name of a matrix -> its parts as they are stored."""
        return {name: Packed(self.scheme, parts) for name, parts in self.matrices.items()}

    def _parts(self, base: str) -> Parts:
        names = {part: f"{base}.{part}" for part in self.packing.parts}
        infos = {part: self.owners[name].tensors[name] for part, name in names.items() if name in self.owners}
        return Parts(base, infos, lambda part: self.owners[names[part]].read_packed(names[part]))

    def _info(self, name: str, parts: Parts) -> TensorInfo:
        """A tensor said to lie where the largest of its parts does."""
        largest = max(parts.infos.values(), key=lambda info: info.nbytes)
        return largest._replace(name=name, dtype=self.code, shape=self.packing.shape(parts, self.scheme))

    def read(self, name: str, rows: slice | None = None, *, cached: bool = True) -> np.ndarray:
        """A fresh array, or some of its rows.

        Raises what reading its parts raises, LossyConversionError for values beyond the dtype.
        """
        if name not in self.matrices:
            return self.owners[name].read(name, rows, cached=cached)
        parts, info = self.matrices[name], self.tensors[name]
        unpack = self.packing.rows(parts, self.scheme, (info.shape[0], info.shape[1]))
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
