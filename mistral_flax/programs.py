"""How functions become programs: as one program where JAX would compile every operation, and by C where C can be.

What C computes is the same as a formula but for rounding, on CPUs and on one device. A program for a file knows no
function of ours, and one for other processors has no use for it: there the formula is what is run, as it is what is
differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

in_one_program = functools.partial(jax.jit, inline=True)
"""A function of arrays is one program where it is called outside of `jax.jit`, and its own operations within."""

Function = Callable[..., Array]
"""A function of arrays and of options by name, which are no arrays."""


def by_c(
    code: Function, formula: Function, *arrays: Array, shape: tuple[int, ...], dtype: Any, **options: Hashable
) -> Array:
    """`code(*arrays, **options)` in a program that runs here on a CPU, `formula` of the same in any other one.

    Both give an array of this shape and dtype. The derivative is the formula's, for which nothing but the arrays is
    kept; integers among them have none.
    """
    named = tuple(sorted(options.items()))
    return _either.bind(*arrays, code=code, formula=formula, shape=shape, dtype=jnp.dtype(dtype), options=named)


_either = Primitive("mistral_by_c")


@_either.def_impl
def _formula(*arrays: Array, formula: Function, options: tuple[tuple[str, Hashable], ...], **_: Any) -> Array:
    return formula(*arrays, **dict(options))


def _code(*arrays: Array, code: Function, options: tuple[tuple[str, Hashable], ...], **_: Any) -> Array:
    return code(*arrays, **dict(options))


@_either.def_abstract_eval
def _result(first: Any, *_: Any, shape: tuple[int, ...], dtype: Any, **__: Any) -> Any:
    return first.update(shape=shape, dtype=dtype)


def _differentiated(arrays: tuple[Array, ...], tangents: tuple[Any, ...], **parameters: Any) -> tuple[Array, Array]:
    of_formula = jax.checkpoint(functools.partial(_formula, **parameters))
    _, tangent = jax.jvp(of_formula, arrays, tuple(map(ad.instantiate_zeros, tangents)))
    return _either.bind(*arrays, **parameters), tangent


def _mapped(
    arrays: tuple[Array, ...],
    axes: tuple[int | None, ...],
    *,
    code: Function,
    formula: Function,
    shape: tuple[int, ...],
    dtype: Any,
    options: tuple[tuple[str, Hashable], ...],
) -> tuple[Array, int]:
    def each(function: Function) -> Function:
        return jax.vmap(functools.partial(function, **dict(options)), axes)

    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    return by_c(each(code), each(formula), *arrays, shape=(size, *shape), dtype=dtype), 0


_as_formula = mlir.lower_fun(_formula, multiple_results=False)
_as_code = mlir.lower_fun(_code, multiple_results=False)


def _here(context: Any, *arrays: Any, **parameters: Any) -> Any:
    is_for_a_file = context.module_context.lowering_parameters.for_export
    return (_as_formula if is_for_a_file else _as_code)(context, *arrays, **parameters)


ad.primitive_jvps[_either] = _differentiated
batching.primitive_batchers[_either] = _mapped
mlir.register_lowering(_either, _as_formula)
mlir.register_lowering(_either, _here, platform="cpu")
