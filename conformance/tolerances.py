"""How far a backend may be from the specification, and why.

A unit in the last place (ulp) is the dtype's eps times the largest expected value of the array.

float32 is compared with the exact specification. The bound of everything is the 32 ulp the product promises, of
gradients twice that; single pieces, whose error does not pile up over layers, have smaller ones.

A cache in int8 steps: where a code is another one, what follows differs by some thousand ulp. Its text is one where no
code can be (`cases.INT8`), so codes must be equal and the bound of everything else stays; measured worst: 8 of 32 ulp.

bfloat16 is compared with the specification rounded at exactly the casts of the contract. Where the operation order
is fixed (eager) a backend must then be equal to the bit but for the rare value that lies on a rounding border, whose
neighbours it may push: hence a fraction of equal elements, and one rounding's worth of distance for a single piece.
Over layers such a push spreads like rounding itself, so the bound of a whole model is the distance that rounding puts
between the specification and itself: `measured`. Fused kernels round elsewhere inside attention. They are compared
with the exact specification, and their error may be twice that of the contract's rounding. So are packed matrices: a
product may take their numbers as they are or rounded to bfloat16, and the contract's rounding is then that of both.
So is float16 everywhere, whose products frameworks add up in different orders with roundings between.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

FUSED = ("sdpa", "blocked", "flex", "dot_product")


class Tolerance(NamedTuple):
    """A bound in ulp, and the fraction of elements that must be equal to the bit."""

    ulp: float
    equal: float = 0.0


# float32 ulp of pieces without layers below them; measured worst beside each (python -m conformance)
PIECES = {
    "rotary": 4.0,
    "rms_norm": 4.0,
    "rotate": 4.0,
    "mask": 0.0,
    "noise": 4.0,
    "scores": 4.0,
    "attention": 16.0,
    "mlp": 16.0,
    "packed_product": 16.0,
    "layer": 16.0,
}
MODEL = 32.0
"""float32 ulp of everything that has gone through all layers: what the README promises."""

GRADIENTS = 2 * MODEL
"""float32 ulp of gradients, of each one's own largest entry: they go through all layers twice, forth and back."""

BFLOAT16_EQUAL = {"rms_norm": 0.99, "rotate": 0.99, "attention": 0.97, "mlp": 0.95, "layer": 0.95}
"""Eager bfloat16: fraction equal to the bit. A misplaced cast leaves 75 % (measured by the mutants of meta/)."""


def rounds_elsewhere(dtype: str, implementation: str, packed: bool = False) -> bool:
    """Whether there may be other casts than the contract's: in an attention implementation, or of a packed matrix."""
    return dtype == "float16" or (dtype != "float32" and (implementation in FUSED or packed))


def eps_of(dtype: str) -> float:
    """The machine epsilon of a dtype by name."""
    return float(ml_dtypes.finfo(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)).eps)


def tolerance(piece: str, dtype: str, implementation: str, *, measured: float = 0.0, packed: bool = False) -> Tolerance:
    """The bound of one piece; `measured` is the ulp between the rounded and the exact specification."""
    if piece in ("mask", "greedy"):
        return Tolerance(0.0, 1.0)
    if dtype == "float32":
        return Tolerance(GRADIENTS if piece == "gradients" else PIECES.get(piece, MODEL))
    if piece == "rotary":  # float32 in every precision
        return Tolerance(PIECES[piece] * eps_of("float32") / eps_of(dtype))
    fused = implementation in FUSED and piece in ("attention", "layer")
    if piece in BFLOAT16_EQUAL and dtype == "bfloat16" and not fused:
        return Tolerance(1.0, BFLOAT16_EQUAL[piece])
    return Tolerance(max(1.0, measured * (2.0 if rounds_elsewhere(dtype, implementation, packed) else 1.0)))
