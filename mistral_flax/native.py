"""The kernels in C as functions of arrays: few rows times a packed matrix, and a step of decoding as a whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from flax import nnx
from jax import Array

from mistral_core.classes import runs_its_own
from mistral_core.errors import InputError, MissingExtraError
from mistral_core.native import attention, library, whole_step

from .arrays import memory

_OWN = (jnp.float32, jnp.bfloat16)
"""The dtypes of x that kernels take as they are."""


@functools.cache
def _registered() -> str:
    """Make the kernels known to XLA; why they cannot be, empty where they are."""
    flags = (f"-I{jax.ffi.include_dir()}", f'-DJAXLIB="{jaxlib.version.__version__}"')
    code, reason = library.bound("xla.c", flags, attention=attention.addresses())
    if not reason:
        for name in ("product", "dequantised", "attend", "attention_gradients"):
            handler = jax.ffi.pycapsule(getattr(code, f"mistral_xla_{name}"))
            jax.ffi.register_ffi_target(f"mistral_{name}", handler, platform="cpu")
    return reason


def available() -> bool:
    """Whether there are kernels for arrays on a CPU; the first call compiles them."""
    return not _registered()


def usable() -> bool:
    """Whether C may compute what is called or traced now: on one CPU, for XLA cannot cut what C does over devices."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and available()


def why() -> str:
    """Why there are no kernels, as a sentence; empty where there are."""
    return _registered()


def product(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    activations: str | None = None,
) -> Array:
    """x W^T over the last axis of x, accumulated in float32, in the dtype of x; it has no derivative.

    The rest is a `PackedMatrix`'s. Raises InputError, and MissingExtraError where there are no kernels.
    """
    numbers = _checked(codes, scale, zero, kind, shape, block, activations)
    if x.shape[-1:] != shape[1:]:
        raise InputError(f"x must be [..., {shape[1]}], got {list(x.shape)}.")
    as_given = x.dtype
    if as_given not in _OWN:
        x = x.astype(jnp.float32)
    result = jax.ShapeDtypeStruct((*x.shape[:-1], shape[0]), x.dtype)
    call = jax.ffi.ffi_call("mistral_product", result, vmap_method="sequential")
    return call(x, codes, scale, *([] if zero is None else [zero]), numbers=numbers).astype(as_given)


def dequantised(
    codes: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: Any = None,
    after: Array | None = None,
) -> Array:
    """The matrix [O, I] as float32, the default, or bfloat16.

    It is made when `after` is there, where that is given: XLA runs what waits for nothing as early as it likes. Raises
    InputError, and MissingExtraError where there are no kernels.
    """
    numbers = _checked(codes, scale, zero, kind, shape, block, None)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    if dtype not in _OWN:
        raise InputError(f"dtype must be float32 or bfloat16, got {dtype}.")
    call = jax.ffi.ffi_call("mistral_dequantised", jax.ShapeDtypeStruct(shape, dtype), vmap_method="sequential")
    return call(scale if after is None else after, codes, scale, *([] if zero is None else [zero]), numbers=numbers)


def whole_step_of(model: Any) -> whole_step.WholeStep | None:
    """The step in C of a language model on a CPU; None where it has parts that compute something else, or other dtypes.

    It reads the weights where they are: it is for as long as these stay.
    """
    if not usable():
        return None
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    if not all(map(is_plain, nodes)):
        return None
    return whole_step.of_model(model, dtype=jnp.dtype(model.dtype).name, array=model._array, memory=memory)


def is_plain(module: nnx.Module) -> bool:
    """Whether calling a module does what its class says, as it was written, and no more."""
    own = type(module).__module__.partition(".")[0] == __package__ or type(module) is nnx.Dict
    in_turn = getattr(getattr(module, "run_layers", None), "__name__", "one_by_one") == "one_by_one"
    return own and in_turn and runs_its_own(module, "__call__") and not getattr(module, "adds", ())


def _checked(
    codes: Array,
    scale: Array,
    zero: Array | None,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    activations: str | None,
) -> np.ndarray:
    """What C is told of a matrix. Raises InputError unless its arrays are of their sizes."""
    if reason := _registered():
        raise MissingExtraError(f"kernels in C must be there, got none: {reason}")
    shapes = (codes.shape, scale.shape, None if zero is None else zero.shape)
    return np.array(library.numbers(kind, tuple(shape), tuple(block), activations, *shapes), np.int64)
