"""Writing Orbax directories, in the plainest of Orbax's layouts: zarr version 2, no OCDBT, no compression.

A chunk is then a file of the array's own bytes, so tensors go to their places in any order and nothing is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ....disk import files
from .. import tensor_file
from ..tensor_file import DTYPES, TensorInfo
from .tree import METADATA, ZARR_NAMES


class ZarrArray(NamedTuple):
    """An array to be written."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    """Of one layer, where it is a stack."""
    stacked: tuple[int, int] | None = None
    """The axis along which layers are stacked, and how many."""

    @property
    def name(self) -> str:
        """The path joined by dots."""
        return ".".join(self.path)


def create(directory: Path, arrays: Iterable[ZarrArray]) -> dict[tuple[str, int], TensorInfo]:
    """Describe arrays and reserve their bytes; (name, layer or 0) -> where it goes, in the shape of one layer."""
    arrays = list(arrays)
    infos: dict[tuple[str, int], TensorInfo] = {}
    sizes = [math.prod(array.shape) * DTYPES[array.dtype].itemsize for array in arrays]
    count = [array.stacked[1] if array.stacked else 1 for array in arrays]
    files.require_space(directory, sum(size * layers for size, layers in zip(sizes, count, strict=True)))
    for array, size in zip(arrays, sizes, strict=True):
        folder = directory / array.name
        folder.mkdir(parents=True)
        axis, layers = array.stacked or (0, 1)
        shape, chunk = list(array.shape), list(array.shape)
        if array.stacked:
            shape.insert(axis, layers)
            chunk.insert(axis, 1)
        files.write_file(folder / ".zarray", _json(_zarray(array.dtype, shape, chunk)))
        for layer in range(layers):
            key = ["0"] * len(shape)
            key[axis] = str(layer)
            path = folder / ".".join(key)
            tensor_file.reserve(path, b"", size)
            infos[array.name, layer] = TensorInfo(array.name, array.dtype, array.shape, path, 0, size)
    files.write_file(directory / METADATA, _json(_metadata(arrays)))
    return infos


def _zarray(dtype: str, shape: list[int], chunk: list[int]) -> dict[str, Any]:
    return {
        "chunks": chunk,
        "compressor": None,
        "dimension_separator": ".",
        "dtype": ZARR_NAMES[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": shape,
        "zarr_format": 2,
    }


def _metadata(arrays: Iterable[ZarrArray]) -> dict[str, Any]:
    return {
        "tree_metadata": {
            str(array.path): {
                "key_metadata": [{"key": key, "key_type": 2} for key in array.path],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for array in arrays
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
