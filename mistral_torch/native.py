"""The kernels in C as functions of tensors: few rows times a packed matrix, and a step of decoding as a whole."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mistral_core.classes import runs_its_own
from mistral_core.errors import InputError
from mistral_core.native import build, library, whole_step

from .arrays import memory
from .cache import is_mapped

TYPES = {getattr(torch, name): number for name, number in library.TYPES.items()}
"""Types as C numbers them."""
OWN = (torch.float32, torch.bfloat16)
"""The dtypes of x that kernels take as they are."""
_PARTS = (nn.Embedding, nn.Linear, nn.ModuleList, nn.ModuleDict)
"""The classes of torch itself that models are made of."""
_OPERATIONS = torch.library.Library("mistral_native", "DEF")
_MATRIX = "Tensor codes, Tensor scale, Tensor? zero, str kind, int rows, int columns, int high, int wide"


def available() -> bool:
    """Whether there are kernels for tensors on a CPU; the first call compiles them."""
    return library.available()


def why() -> str:
    """Why there are no kernels, as a sentence; empty where there are."""
    return library.why()


def unwatched(*tensors: Tensor) -> bool:
    """Whether nobody misses what C computes of tensors: plain ones of a CPU, and nothing around it that must see it.

    A compiler, a trace, a map and a derivative forward see operations of torch alone; without them they would take what
    C made for a constant.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor  # the one of gradients of several losses at once
    return all(type(x) in (Tensor, nn.Parameter) and x.is_cpu and not batched(x) for x in tensors)


def transformed() -> bool:
    """Whether torch itself maps, differentiates forward or traces what is computed, by its own operations alone."""
    return is_mapped() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def learnt(*tensors: Tensor) -> bool:
    """Whether gradients go through what is computed of tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    activations: str | None = None,
) -> Tensor:
    """x W^T over the last axis of x, accumulated in float32, in the dtype of x; it has no derivative.

    The rest is a `PackedMatrix`'s. Raises InputError, and MissingExtraError where there are no kernels.
    """
    if learnt(x):
        raise InputError("x must need no gradient, for the kernels in C have none; call it under torch.no_grad().")
    if x.shape[-1] != shape[1]:
        raise InputError(f"x must be [..., {shape[1]}], got {list(x.shape)}.")
    given = x if x.dtype in OWN else x.float()
    if unwatched(given, codes):
        y = _product(given, codes, scale, zero, kind, *shape, *block, activations)
    else:
        y = torch.ops.mistral_native.product(given, codes, scale, zero, kind, *shape, *block, activations)
    return y if given is x else y.to(x.dtype)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T over the last axis of x, float32, of few rows and a bfloat16 W [O, I]; it has no derivative.

    W is read once, and no float32 copy of it is written. Raises MissingExtraError where there are no kernels.
    """
    rows, columns = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    float32 = TYPES[torch.float32]
    code = library.kernels().product_by(
        openmp(), library.FLOATS, weight.data_ptr(), None, TYPES[weight.dtype], None, rows, columns, 1,
        max(columns, 1), x.data_ptr(), float32, y.data_ptr(), float32, x.numel() // max(columns, 1), 0,
        torch.get_num_threads(),
    )  # fmt: skip
    if code:
        library.check(code)
    return y


def dequantised(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    kind: str,
    shape: tuple[int, int],
    block: tuple[int, int],
    dtype: Any = None,
) -> Tensor:
    """The matrix [O, I] as float32, the default, or bfloat16.

    Raises InputError, and MissingExtraError where there are no kernels.
    """
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in OWN:
        raise InputError(f"dtype must be float32 or bfloat16, got {dtype}.")
    if unwatched(codes):
        return _dequantised(codes, scale, zero, kind, *shape, *block, dtype)
    return torch.ops.mistral_native.dequantised(codes, scale, zero, kind, *shape, *block, dtype)


@functools.cache
def openmp() -> int | None:
    """Where the OpenMP that torch has loaded runs a function on its threads, which else keep those of C waiting."""
    try:
        loaded = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # macOS, and builds with another one
        return None


def sgemm() -> int | None:
    """Where the product of float32 is that torch itself calls; None where it is not MKL's on a processor of Intel's.

    There it multiplies hundreds of rows 1.05 times as fast as C here does, elsewhere half as fast.
    """
    if not torch.backends.mkl.is_available() or not build.is_intel():
        return None
    try:
        loaded = ctypes.CDLL(torch._C.__file__, mode=os.RTLD_NOLOAD)  # what torch is linked with is looked through too
        return ctypes.cast(loaded.sgemm_, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    high: int,
    wide: int,
    activations: str | None,
) -> Tensor:
    shapes = (codes.shape, scale.shape, None if zero is None else zero.shape)
    number, *_, rounded = library.numbers(kind, (rows, columns), (high, wide), activations, *shapes)
    codes, scale, zero = _whole(codes, scale, zero)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    one = TYPES[x.dtype]
    code = library.kernels().product_by(
        openmp(), number, codes.data_ptr(), scale.data_ptr(), TYPES[scale.dtype],
        None if zero is None else zero.data_ptr(),
        rows, columns, high, wide, x.data_ptr(), one, y.data_ptr(), one, x.numel() // max(columns, 1), rounded,
        torch.get_num_threads(),
    )  # fmt: skip
    if code:
        library.check(code)
    return y


def _dequantised(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    high: int,
    wide: int,
    dtype: torch.dtype,
) -> Tensor:
    shapes = (codes.shape, scale.shape, None if zero is None else zero.shape)
    number, *_ = library.numbers(kind, (rows, columns), (high, wide), None, *shapes)
    codes, scale, zero = _whole(codes, scale, zero)
    to = torch.empty((rows, columns), dtype=dtype)
    code = library.kernels().dequantised_by(
        openmp(), number, codes.data_ptr(), scale.data_ptr(), TYPES[scale.dtype],
        None if zero is None else zero.data_ptr(),
        rows, columns, high, wide, to.data_ptr(), TYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    if code:
        library.check(code)
    return to


def whole_step_of(model: Any) -> whole_step.WholeStep | None:
    """The step in C of a language model on a CPU; None where it has parts that compute something else, or other dtypes.

    It reads the weights where they are: it is for as long as these stay. A model without a head has the layers alone.
    """
    plain = all(is_plain(module) and _is_own(module) for module in model.modules())
    plain = plain and len(model.base_model.layers) == model.config.num_hidden_layers
    named = dict(model.named_parameters(remove_duplicate=False))
    here = all(type(parameter) is nn.Parameter and parameter.is_cpu for parameter in named.values())
    if not plain or not here or not unwatched() or torch.is_autocast_enabled("cpu") or not available():
        return None
    return whole_step.of_model(
        model, dtype=str(model.dtype).removeprefix("torch."), array=lambda name: memory(named[model._own_name(name)]),
        memory=memory, threads=torch.get_num_threads(), parallel=openmp(), gemm=sgemm(),
    )  # fmt: skip


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class says, as it was written, and no more."""
    hooks = module._forward_hooks or module._forward_pre_hooks or nn.modules.module._has_any_global_hook()
    return runs_its_own(module, "forward") and not hooks and not getattr(module, "adds", ())


def _is_own(module: nn.Module) -> bool:
    """Whether a module is one of those that models here are made of."""
    return type(module).__module__.partition(".")[0] == __package__ or type(module) in _PARTS


def _whole(codes: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tensors of a CPU, as they lie in memory for C. Raises InputError for those of another device or type."""
    if not codes.is_cpu or codes.element_size() != 1 or scale.dtype not in TYPES:
        found = f"{codes.dtype} on {codes.device} and {scale.dtype}"
        raise InputError(f"codes must be bytes on the CPU and scale floats, got {found}.")
    return codes.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous()


_OPERATIONS.define(f"product(Tensor x, {_MATRIX}, str? activations) -> Tensor")
_OPERATIONS.define(f"dequantised({_MATRIX}, ScalarType dtype) -> Tensor")
_OPERATIONS.impl("product", _product, "CPU")
_OPERATIONS.impl("dequantised", _dequantised, "CPU")


@torch.library.register_fake("mistral_native::product", lib=_OPERATIONS)
def _product_shape(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, rows: int, *_: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("mistral_native::dequantised", lib=_OPERATIONS)
def _dequantised_shape(
    codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, rows: int, columns: int, high: int, wide: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty((rows, columns), dtype=dtype)
