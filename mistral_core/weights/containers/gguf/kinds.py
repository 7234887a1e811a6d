"""GGUF's types of tensors, and the moves between their bytes and arrays of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .... import extras
from ....errors import LossyConversionError, NonFiniteWeightsError, UnsupportedFeatureError
from ..tensor_file import TensorInfo, quoted

_STRIP_BYTES = 1 << 20  # of quantised numbers at once: unpacking takes several times as much


class GgufKind(NamedTuple):
    """A type of tensors: its number in the file, how many values a block holds and in how many bytes."""

    number: int
    values: int = 1
    size: int = 0


_KINDS = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "F64": (28, 1, 8),
    "I8": (24, 1, 1), "I16": (25, 1, 2), "I32": (26, 1, 4), "I64": (27, 1, 8),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q8_1": (9, 32, 40), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
}  # fmt: skip
KINDS = {code: GgufKind(*numbers) for code, numbers in _KINDS.items()}
"""Dtype code -> kind."""

BY_NUMBER = {kind.number: code for code, kind in KINDS.items()}
QUANTISED = frozenset(code for code, kind in KINDS.items() if kind.values > 1)
LARGEST = {"Q8_0": 127 * 65504.0, "Q4_0": 8 * 65504.0}
"""Types that are written -> the largest number they can say: their scales are float16."""


def nbytes(code: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) // KINDS[code].values * KINDS[code].size


# Quantised


def dequantised(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The float32 values of a quantised tensor's bytes."""
    quants, kind = _quants(info.name, info.dtype)
    rows = data.reshape(-1, info.shape[-1] // KINDS[info.dtype].values * KINDS[info.dtype].size)
    values = np.empty((len(rows), info.shape[-1]), np.float32)
    step = max(1, _STRIP_BYTES // max(rows.shape[1], 1))
    try:
        with np.errstate(all="ignore"):
            for start in range(0, len(rows), step):
                values[start : start + step] = quants.dequantize(rows[start : start + step], kind)
    except NotImplementedError as cause:
        raise UnsupportedFeatureError(f"{quoted(info.name)}: gguf cannot dequantise {info.dtype}.") from cause
    return values.reshape(info.shape)


def quantised(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The bytes of a matrix in a type of `LARGEST`; raises NonFiniteWeightsError, LossyConversionError."""
    quants, kind = _quants(info.name, info.dtype)
    row_bytes = array.shape[1] // KINDS[info.dtype].values * KINDS[info.dtype].size
    data = np.empty((len(array), row_bytes), np.uint8)
    step = max(1, _STRIP_BYTES // max(row_bytes, 1))
    with np.errstate(all="ignore"):
        for start in range(0, len(array), step):
            strip = array[start : start + step].astype(np.float32)
            _check_quantisable(strip, info)
            data[start : start + step] = quants.quantize(strip, kind)
    return data


def _check_quantisable(strip: np.ndarray, info: TensorInfo) -> None:
    largest = float(max(strip.max(), -strip.min()))
    if not np.isfinite(largest):
        raise NonFiniteWeightsError(f"{quoted(info.name)}: NaN or infinity, which {info.dtype} cannot say; keep it.")
    if largest > LARGEST[info.dtype]:
        raise LossyConversionError(f"{quoted(info.name)}: {largest:g} is beyond {info.dtype}; keep its own dtype.")


def _quants(name: str, code: str) -> tuple[ModuleType, Any]:
    quants = extras.require("gguf.quants", "convert", what=f"{quoted(name)}: {code}")
    if code not in quants.GGMLQuantizationType.__members__:
        raise UnsupportedFeatureError(f"{quoted(name)}: the installed gguf does not know {code}; upgrade it.")
    return quants, quants.GGMLQuantizationType[code]
