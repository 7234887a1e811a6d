"""bitsandbytes nf4: rows on end in blocks, each number one of sixteen values times the largest of its block."""

from __future__ import annotations

import math

import numpy as np

from ..disk import strict_json
from ..errors import CorruptCheckpointError
from ..plain import is_int, is_number
from . import matrix
from .blocks import Rows
from .matrix import PackedMatrix
from .packings import Packing, Parts
from .schemes import Scheme

_SMALL_BYTES = 4096
_STATE = "weight.quant_state.bitsandbytes__nf4"


def _nf4_state(parts: Parts) -> dict[str, int | float]:
    where = f"{parts.where}: {_STATE}"
    info = parts.infos[_STATE]
    if info.dtype != "U8" or info.nbytes > _SMALL_BYTES:
        raise CorruptCheckpointError(f"{where} must be a small JSON, got {info.nbytes} bytes of {info.dtype}.")
    state = strict_json.parse_object(parts.read(_STATE).tobytes(), where=where, error=CorruptCheckpointError)
    nested = "weight.nested_absmax" in parts.infos
    shape = state.get("shape")
    sizes = [*(shape if isinstance(shape, list) else [None]), state.get("blocksize")]
    sizes += [state.get("nested_blocksize")] if nested else []
    offset = state.get("nested_offset") if nested else 0.0
    whole = all(is_int(size) and 0 < size < 1 << 31 for size in sizes)
    if state.get("quant_type") != "nf4" or len(sizes) != 3 + nested or not whole or not is_number(offset):
        raise CorruptCheckpointError(
            f"{where} must have quant_type nf4, a shape of two sizes, and blocksize, nested or not."
        )
    names = ("out", "in", "block", "nested_block")
    return {**dict(zip(names, sizes, strict=False)), "offset": float(offset or 0)}


def _nf4_shape(parts: Parts, scheme: Scheme) -> tuple[int, int]:
    state = _nf4_state(parts)
    shape = int(state["out"]), int(state["in"])
    size = math.prod(shape)
    blocks = math.ceil(size / state["block"])
    packed = math.ceil(size / 2)
    parts.check("weight", {"U8"}, (packed, 1), (1, packed), (packed,))
    parts.check("weight.quant_map", {"F32"}, (16,))
    if "nested_block" in state:
        parts.check("weight.absmax", {"U8"}, (blocks,))
        parts.check("weight.nested_quant_map", {"F32"}, (256,))
        parts.check("weight.nested_absmax", {"F32"}, (math.ceil(blocks / state["nested_block"]),))
    else:
        parts.check("weight.absmax", {"F32"}, (blocks,))
    return shape


def _nf4_rows(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> Rows:
    state = _nf4_state(parts)
    packed, values = parts.read("weight").reshape(-1), parts.read("weight.quant_map")
    largest = _scales(parts, state)

    def rows(wanted: slice) -> np.ndarray:
        start, stop = wanted.start * shape[1], wanted.stop * shape[1]
        pairs = packed[start // 2 : -(-stop // 2)]
        numbers = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[: stop - start]
        scale = largest[np.arange(start, stop) // int(state["block"])]
        result: np.ndarray = (values[numbers] * scale).reshape(-1, shape[1])
        return result

    return rows


def _scales(parts: Parts, state: dict[str, int | float]) -> np.ndarray:
    """The largest of each block, in float32."""
    largest = parts.read("weight.absmax")
    if "nested_block" in state:
        outer = parts.read("weight.nested_absmax")[np.arange(largest.size) // int(state["nested_block"])]
        largest = parts.read("weight.nested_quant_map")[largest] * outer + np.float32(state["offset"])
    return largest


def _nf4_matrix(parts: Parts, scheme: Scheme, shape: tuple[int, int]) -> PackedMatrix | None:
    state = _nf4_state(parts)
    block = int(state["block"])
    if shape[1] % block or block % 2 or (parts.read("weight.quant_map") != matrix.NF4).any():
        return None
    pairs = parts.read("weight").reshape(shape[0], -1)
    return PackedMatrix(
        "nf4", matrix.swapped(pairs), _scales(parts, state).reshape(shape[0], -1), None, shape, (1, block)
    )


NF4 = Packing(
    (
        _STATE,
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
    ),
    _nf4_shape,
    _nf4_rows,
    _nf4_matrix,
)
