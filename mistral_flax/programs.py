"""How functions become programs: as one program where JAX would compile every operation, and by C where C can be.

What C computes is the same as a formula but for rounding, on CPUs and on one device. A program for a file knows no
function of ours, and one for other processors has no use for it: there the formula is what is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

in_one_program = functools.partial(jax.jit, inline=True)
"""A function of arrays is one program where it is called outside of `jax.jit`, and its own operations within."""

Function = Callable[..., Any]
"""A function of arrays, and of options by name which are no arrays, that gives an array or a tuple of them."""


def by_c(
    code: Function, formula: Function, *arrays: Array, like: Any, gradient: Function | None = None, **options: Hashable
) -> Any:
    """`code(*arrays, **options)` in a program that runs here on a CPU, `formula` of the same in any other one.

    Both give arrays as `like` has them, a ShapeDtypeStruct or a tuple of some. Derivatives are the formula's, for which
    nothing but arrays and results is kept, and integers have none. With a `gradient`, those that go backwards are
    `gradient(*upstream, *results, *arrays, **options)` where `code` is used: a tuple, of the arrays of floats.
    """
    results = like if isinstance(like, tuple) else (like,)
    shapes, named = tuple((each.shape, jnp.dtype(each.dtype)) for each in results), tuple(sorted(options.items()))
    found = _either.bind(*arrays, code=code, formula=formula, gradient=gradient, like=shapes, options=named)
    return tuple(found) if isinstance(like, tuple) else found[0]


def _called(function: Function, *arrays: Array, options: Any) -> Sequence[Array]:
    found = function(*arrays, **dict(options))
    return found if isinstance(found, tuple) else (found,)


def _formula(*arrays: Array, formula: Function, options: Any, **_: Any) -> Sequence[Array]:
    return _called(formula, *arrays, options=options)


def _code(*arrays: Array, code: Function, options: Any, **_: Any) -> Sequence[Array]:
    return _called(code, *arrays, options=options)


def _results(first: Any, *_: Any, like: Any, **__: Any) -> list[Any]:
    return [first.update(shape=shape, dtype=dtype) for shape, dtype in like]


def _floats(arrays: Sequence[Any]) -> list[int]:
    """Where floats are among arrays."""
    return [i for i, array in enumerate(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]


# ---- what C or the formula gives ----

_either = Primitive("mistral_by_c")
_either.multiple_results = True
_either.def_abstract_eval(_results)


@_either.def_impl
def _run(*arrays: Array, **parameters: Any) -> Sequence[Array]:
    if jax.config.jax_disable_jit:
        return _formula(*arrays, **parameters)
    return _program(tuple(sorted(parameters.items())))(*arrays)


@functools.lru_cache
def _program(parameters: Any) -> Function:
    """What is bound outside of any program, as one."""
    return jax.jit(lambda *arrays: _either.bind(*arrays, **dict(parameters)))


_as_formula = mlir.lower_fun(_formula, multiple_results=True)
_as_code = mlir.lower_fun(_code, multiple_results=True)


def _here(context: Any, *arrays: Any, **parameters: Any) -> Any:
    is_for_a_file = context.module_context.lowering_parameters.for_export
    return (_as_formula if is_for_a_file else _as_code)(context, *arrays, **parameters)


mlir.register_lowering(_either, _as_formula)
mlir.register_lowering(_either, _here, platform="cpu")


def _mapped(arrays: Sequence[Array], axes: Sequence[int | None], **parameters: Any) -> tuple[list[Array], list[int]]:
    if parameters["gradient"] is not None:
        arrays, axes = _in_front(arrays, axes), [0] * len(arrays)
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    found = _either.bind(*arrays, **_for_each(size, axes, **parameters))
    return found, [0] * len(found)


def _in_front(arrays: Sequence[Array], axes: Sequence[int | None]) -> list[Array]:
    """All arrays with the mapped axis as the first one."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    return [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]


def _for_each(
    size: int, axes: Sequence[int | None], *, code: Function, formula: Function, gradient: Function | None, like: Any,
    options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The parameters for arrays that are mapped over these axes."""

    def each(function: Function, axes: Any) -> Function:
        return jax.vmap(functools.partial(function, **dict(options)), axes)

    return {
        "code": each(code, tuple(axes)),
        "formula": each(formula, tuple(axes)),
        "gradient": None if gradient is None else each(gradient, 0),
        "like": tuple(((size, *shape), dtype) for shape, dtype in like),
        "options": (),
    }


batching.primitive_batchers[_either] = _mapped


def _differentiated(arrays: Sequence[Array], tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
    found = _either.bind(*arrays, **parameters)
    along = [ad.instantiate_zeros(tangents[i]) for i in _floats(arrays)]
    return found, _slope.bind(*arrays, *found, *along, count=len(arrays), **parameters)


ad.primitive_jvps[_either] = _differentiated

# ---- the derivative along tangents of the arrays of floats; given are the arrays, the results and the tangents ----

_slope = Primitive("mistral_by_c_slope")
_slope.multiple_results = True


def _along(*given: Array, count: int, formula: Function, options: Any, like: Any, **_: Any) -> Sequence[Array]:
    of_floats, floats = _of_floats(formula, given[:count], options)
    return jax.jvp(jax.checkpoint(of_floats), floats, given[count + len(like) :])[1]


def _of_floats(formula: Function, arrays: Sequence[Array], options: Any) -> tuple[Function, tuple[Array, ...]]:
    """A formula as a function of the floats among the arrays alone, and these."""
    where = _floats(arrays)

    def of_floats(*floats: Array) -> Sequence[Array]:
        given = list(arrays)
        for i, x in zip(where, floats, strict=True):
            given[i] = x
        return _called(formula, *given, options=options)

    return of_floats, tuple(arrays[i] for i in where)


_slope.def_impl(_along)
_slope.def_abstract_eval(_results)
mlir.register_lowering(_slope, mlir.lower_fun(_along, multiple_results=True))


def _along_twice(given: Sequence[Array], tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
    return jax.jvp(functools.partial(_along, **parameters), given, tuple(map(ad.instantiate_zeros, tangents)))


ad.primitive_jvps[_slope] = _along_twice


def _back(upstream: Sequence[Any], *given: Any, count: int, **parameters: Any) -> list[Any]:
    """The gradients of the arrays of floats; what is no tangent has none here."""
    formula, options, results = parameters["formula"], parameters["options"], len(parameters["like"])
    arrays, tangents = given[:count], given[count + results :]
    _, floats = _of_floats(formula, arrays, options)
    like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in floats)
    by_formula = _Gradient(formula, results)
    from_above = (*map(ad.instantiate_zeros, upstream), *given[count : count + results], *arrays)
    found = by_c(parameters["gradient"] or by_formula, by_formula, *from_above, like=like, **dict(options))
    wanted = [g if ad.is_undefined_primal(tangent) else None for g, tangent in zip(found, tangents, strict=True)]
    return [None] * (count + results) + wanted


class _Gradient(NamedTuple):
    """The gradients by a formula: of what comes from above, its results, and its arrays."""

    formula: Function
    results: int

    def __call__(self, *given: Array, **options: Hashable) -> tuple[Array, ...]:
        of_floats, floats = _of_floats(self.formula, given[2 * self.results :], tuple(options.items()))
        return jax.vjp(of_floats, *floats)[1](given[: self.results])


ad.primitive_transposes[_slope] = _back


def _slope_mapped(given: Sequence[Array], axes: Sequence[int | None], *, count: int, **parameters: Any) -> Any:
    given = _in_front(given, axes)
    found = _slope.bind(*given, count=count, **_for_each(len(given[0]), [0] * count, **parameters))
    return found, [0] * len(found)


batching.primitive_batchers[_slope] = _slope_mapped
