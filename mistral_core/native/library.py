"""The kernels of `rows.c` for NumPy's arrays, and by address for those of others."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError, MissingExtraError
from ..quantization.matrix import PackedMatrix
from . import build

SOURCE = "rows.c"
KINDS = {"int8": 0, "int4": 1, "nf4": 2, "fp8": 3}
"""The kinds of codes by the numbers that C has for them."""
FLOATS = 4
"""The number of a matrix of floats, whose type stands where that of scales does."""
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The same of types: x, y and dequantised matrices have one of the first two, scales any."""
ACTIVATIONS = {None: 0, "int8": 1}
"""x as it is, or rounded to int8 in blocks of 128 columns."""

_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_MATRIX = (_I, _P, _P, _I, _P, _L, _L, _L, _L)


class Kernels(NamedTuple):
    """Functions of C, which take addresses and sizes and give 0."""

    product: Callable[..., int]
    """(kind, codes, scale, its type, zero or None, O, I, rows and columns of a block, x, its type, y, its type, R,
    1 where x is rounded, threads or 0)."""
    dequantised: Callable[..., int]
    """(kind, codes, scale, its type, zero or None, O, I, rows and columns of a block, to, its type, threads)."""
    product_by: Callable[..., int]
    """`product` after the address of a `Parallel`, or None: by the threads of another library."""
    dequantised_by: Callable[..., int]
    read: Callable[..., int]
    """(address, 64-bit words, threads): their sum, for comparing with how fast memory is read."""
    addresses: tuple[int, ...]
    """What other libraries are told: product, dequantised, product_by, and what runs a job by threads."""


@functools.cache
def _loaded() -> Kernels | str:
    path = build.library(SOURCE)
    if path is None:
        return build.why(SOURCE)
    try:
        code = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}."
    code.mistral_product.argtypes = [*_MATRIX, _P, _I, _P, _I, _L, _I, _I]
    code.mistral_dequantised.argtypes = [*_MATRIX, _P, _I, _I]
    code.mistral_product_by.argtypes = [_P, *code.mistral_product.argtypes]
    code.mistral_dequantised_by.argtypes = [_P, *code.mistral_dequantised.argtypes]
    code.mistral_read.argtypes, code.mistral_read.restype = [_P, _L, _I], ctypes.c_uint64
    told = (code.mistral_product, code.mistral_dequantised, code.mistral_product_by, code.mistral_run)
    addresses = tuple(ctypes.cast(each, _P).value or 0 for each in told)
    return Kernels(
        code.mistral_product, code.mistral_dequantised, code.mistral_product_by, code.mistral_dequantised_by,
        code.mistral_read, addresses,
    )  # fmt: skip


def available() -> bool:
    """Whether there are kernels; the first call compiles them."""
    return not isinstance(_loaded(), str)


def why() -> str:
    """Why there are no kernels, as a sentence; empty where there are."""
    found = _loaded()
    return found if isinstance(found, str) else ""


def kernels() -> Kernels:
    """The functions of C. Raises MissingExtraError where there are none."""
    found = _loaded()
    if isinstance(found, str):
        raise MissingExtraError(f"kernels in C must be there, got none: {found}")
    return found


def bound(
    source: str, flags: tuple[str, ...], load: Callable[[str], Any] = ctypes.CDLL, *,
    attention: tuple[int, int] | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """A framework's library, made of another source and told where the kernels are, and why there is none: "".

    `attention` are the addresses of attention in C and of its gradients, for one that takes them.
    """
    if not available():
        return None, why()
    path = build.library(source, flags=flags)
    if path is None:
        return None, build.why(source, flags=flags)
    try:
        found = load(str(path))
        code = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        return None, f"{path} cannot be loaded: {error}."
    code.mistral_bind.argtypes = [_P] * 4
    code.mistral_bind(*kernels().addresses)
    if attention is not None:
        code.mistral_bind_attention.argtypes = [_P] * 2
        code.mistral_bind_attention(*attention)
    return found, ""


def check(code: int) -> None:
    """Raise InputError or MemoryError for what a kernel gives unless it is 0."""
    if code == 1:
        raise InputError("kind, types and sizes must be those of a packed matrix, got others.")
    if code:
        raise MemoryError("the kernels in C have no memory for a few rows.")


Shape = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def numbers(
    kind: str, shape: Shape, block: Shape, activations: str | None, codes: Shape, scale: Shape, zero: Shape | None
) -> tuple[int, int, int, int, int, int]:
    """(kind, O, I, rows and columns of a block, 1 where x is rounded) for C, of a matrix of arrays of these shapes.

    Raises InputError unless they are those that C reads, whatever they are.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if activations not in ACTIVATIONS:
        raise InputError(f'activations must be None or "int8", got {activations!r}.')
    if activations and kind not in ("int8", "int4"):
        raise InputError(f"activations are rounded for int8 and int4 only, got {kind}; leave them out.")
    if min(block) < 1:
        raise InputError(f"block must be at least (1, 1), got {block}.")
    (rows, columns), (high, wide) = shape, block
    width = columns if kind in ("int8", "fp8") else -(-columns // 2)
    if codes != (rows, width):
        raise InputError(f"codes must be {[rows, width]} for {kind} of {list(shape)}, got {list(codes)}.")
    grid = (-(-rows // high), -(-columns // wide))
    for each in (scale, zero):
        if each is not None and each != grid:
            raise InputError(f"scale and zero must be {list(grid)} for blocks of {list(block)}, got {list(each)}.")
    return KINDS[kind], rows, columns, high, wide, ACTIVATIONS[activations]


def product(x: np.ndarray, matrix: PackedMatrix, *, activations: str | None = None, threads: int = 0) -> np.ndarray:
    """x W^T over the last axis of x, accumulated in float32, in the dtype of x: float32 or bfloat16.

    With `activations` "int8" x is rounded in blocks of 128 columns to max|x| / 127, halves to even; where a
    processor adds products of bytes, their sums are of integers. Raises InputError and MissingExtraError.
    """
    kind, rows, columns, high, wide, rounded = _numbers(matrix, activations)
    if x.shape[-1:] != (columns,) or x.dtype.name not in ("float32", "bfloat16"):
        raise InputError(f"x must be float32 or bfloat16 [..., {columns}], got {x.dtype} {list(x.shape)}.")
    arrays, given = _arrays(matrix)
    x, y = np.ascontiguousarray(x), np.empty((*x.shape[:-1], rows), x.dtype)
    one = TYPES[x.dtype.name]
    code = kernels().product(
        kind, *given, rows, columns, high, wide, x.ctypes.data, one, y.ctypes.data, one, x.size // max(columns, 1),
        rounded, threads,
    )  # fmt: skip
    del arrays
    check(code)
    return y


def dequantised(matrix: PackedMatrix, dtype: npt.DTypeLike = np.float32, *, threads: int = 0) -> np.ndarray:
    """The matrix [O, I] as float32 or bfloat16, rounded as `quantization.matrix.dequantised` does.

    Raises InputError and MissingExtraError.
    """
    kind, rows, columns, high, wide, _ = _numbers(matrix)
    to = np.empty(matrix.shape, dtype)
    if to.dtype.name not in ("float32", "bfloat16"):
        raise InputError(f"dtype must be float32 or bfloat16, got {to.dtype}.")
    arrays, given = _arrays(matrix)
    code = kernels().dequantised(
        kind, *given, rows, columns, high, wide, to.ctypes.data, TYPES[to.dtype.name], threads
    )  # fmt: skip
    del arrays
    check(code)
    return to


def _numbers(matrix: PackedMatrix, activations: str | None = None) -> tuple[int, int, int, int, int, int]:
    zero = None if matrix.zero is None else matrix.zero.shape
    shapes = (matrix.codes.shape, matrix.scale.shape, zero)
    return numbers(matrix.kind, matrix.shape, matrix.block, activations, *shapes)


def _arrays(matrix: PackedMatrix) -> tuple[list[Any], tuple[int, int, int, int | None]]:
    """Arrays to keep, and addresses and type of codes, scales and zero points. Raises InputError."""
    if matrix.scale.dtype.name not in TYPES or matrix.codes.itemsize != 1:
        raise InputError(f"scale must be of {', '.join(TYPES)} and codes of bytes, got {matrix.scale.dtype}.")
    codes, scale = np.ascontiguousarray(matrix.codes), np.ascontiguousarray(matrix.scale)
    zero = None if matrix.zero is None else np.ascontiguousarray(matrix.zero, np.int8)
    given = (codes.ctypes.data, scale.ctypes.data, TYPES[scale.dtype.name], None if zero is None else zero.ctypes.data)
    return [codes, scale, zero], given
