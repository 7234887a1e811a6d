"""Matrices of few bits: how those of the cases are packed, and products of them alone on shapes that no model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mistral_core.arrays import Array
from mistral_core.config import MistralConfig
from mistral_core.parameters import LM_HEAD
from mistral_core.quantization.matrix import KINDS, PackedMatrix, packed_codes
from mistral_core.quantization.request import Quantization

ARCHITECTURE = "MistralForCausalLM"
FP8_BLOCK = (96, 128)
"""Rows and columns: the last block of a matrix has fewer rows."""
LARGEST_FP8 = 448

PACKINGS: Mapping[str, Quantization | None] = {
    "int8 row": Quantization("int8", head="int8"),
    "int8 32": Quantization("int8", group_size=32),
    **{f"int4 {group}": Quantization("int4", group_size=group) for group in (16, 32, 64, 128)},
    "int4 row": Quantization("int4", group_size=-1),
    "int4 asymmetric": Quantization("int4", group_size=32, symmetric=False, head="off"),
    "nf4 64": Quantization("nf4"),
    "nf4 16": Quantization("nf4", group_size=16),
    "nf4 doubled": Quantization("nf4", double_quant=True),
    "fp8 block": None,
}
"""What a user asks for to have it; None: only others' files have it. The head of int4 is int8 where it is not tied."""


def matrices(packing: str, config: MistralConfig, floats: Mapping[str, Array]) -> dict[str, PackedMatrix]:
    """Canonical name -> packed matrix of every matrix that the packing has."""
    asked = PACKINGS[packing]
    if asked is None:
        names = Quantization("int8", head="int8").resolved(config, ARCHITECTURE).matrices(config, ARCHITECTURE)
        return {name: eight_bit_floats(floats[name]) for name in names}
    asked = asked.resolved(config, ARCHITECTURE)
    return {name: asked.quantise(name, floats[name]) for name in asked.matrices(config, ARCHITECTURE)}


def eight_bit_floats(w: Array) -> PackedMatrix:
    """The nearest numbers of E4M3, with a float32 scale for each block."""
    high, wide = FP8_BLOCK
    down, across = (-(-size // length) for size, length in zip(w.shape, FP8_BLOCK, strict=True))
    largest = [
        [np.abs(w[d * high : (d + 1) * high, a * wide : (a + 1) * wide]).max() for a in range(across)]
        for d in range(down)
    ]
    scale = np.array(largest, np.float32) / LARGEST_FP8
    spread = scale.repeat(high, 0)[: w.shape[0]].repeat(wide, 1)[:, : w.shape[1]]
    codes = (w.astype(np.float32) / spread).astype(ml_dtypes.float8_e4m3fn)
    return PackedMatrix("fp8", codes.view(np.uint8), scale, None, (w.shape[0], w.shape[1]), FP8_BLOCK)


class Odd(NamedTuple):
    """A matrix of random codes."""

    kind: str
    shape: tuple[int, int]
    block: tuple[int, int]
    rows: tuple[int, ...]
    """How many are multiplied: one, a few, and more than kernels of few rows take."""
    scale: str = "float32"
    zero: bool = False

    @property
    def matrix(self) -> PackedMatrix:
        """It: every code there is but NaN, scales of both signs, zero points at the ends."""
        random = np.random.default_rng(len(self.kind) * self.shape[1])
        values = KINDS[self.kind].values
        numbers = random.choice(np.flatnonzero(np.isfinite(values)), self.shape).astype(np.uint8)
        sizes = tuple(-(-size // length) for size, length in zip(self.shape, self.block, strict=True))
        scale = (
            random.uniform(0.5, 2, sizes) * random.choice([-1, 1], sizes) / np.abs(values[np.isfinite(values)]).max()
        )
        kind = ml_dtypes.bfloat16 if self.scale == "bfloat16" else np.dtype(self.scale)
        zero = random.choice([-8, -1, 0, 7], sizes).astype(np.int8) if self.zero else None
        return PackedMatrix(
            self.kind, packed_codes(self.kind, numbers), scale.astype(kind), zero, self.shape, self.block
        )


ODD = (
    Odd("int8", (7, 33), (1, 33), (1, 3)),
    Odd("int8", (130, 96), (1, 32), (1, 17), "float16", zero=True),
    Odd("int4", (7, 33), (1, 33), (1, 17), zero=True),
    Odd("int4", (7, 96), (1, 32), (1, 3), "bfloat16"),
    Odd("int4", (160, 256), (1, 128), (1, 17), "bfloat16", zero=True),
    Odd("nf4", (7, 96), (1, 16), (1, 3)),
    Odd("nf4", (160, 256), (1, 64), (1, 17)),
    Odd("fp8", (9, 70), (4, 32), (1, 3, 17)),
)
"""No multiple of a vector; more than one block of rows; each dtype of scales."""
CODES = {"float32": ("int4 asymmetric", "nf4 doubled"), "bfloat16": ("int8 row", "int4 32")}
"""The packings whose codes are compared, by the dtype of the floats: each way to choose a scale."""


def wanted(asked: Quantization, name: str, w: Array) -> tuple[Array, Array, Array | None]:
    """Unsigned codes, scales and zero points of a matrix by the specification."""
    from mistral_core.reference import quantized

    if asked.scheme == "nf4":
        group = asked.group_size or 0
        scale = quantized.nf4_scales(w, group)
        codes = quantized.nf4_codes(w, group, scale)
        kept = quantized.unnested(*quantized.nested(scale)).reshape(scale.shape) if asked.double_quant else scale
        return codes, kept, None
    bits, group, symmetric = 8 if asked.scheme == "int8" else 4, asked.group_size or -1, asked.symmetric
    if name == LM_HEAD:
        bits, group, symmetric = 8, -1, True
    group = w.shape[1] if group == -1 else group
    scale, zero = quantized.integer_scales(w, bits, group, symmetric, w.dtype)
    return quantized.integer_codes(w, bits, group, scale, zero), scale, zero
