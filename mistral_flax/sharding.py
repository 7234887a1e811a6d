"""A finished model over a mesh of devices: a guest of which layers.py and model.py know nothing.

Parameters are cut by rules over axis letters (`mistral_core.sharding`), and so is what layers give each other: without
that, the compiler may gather a batch where it should gather weights. Gradients have their parameters' sharding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mistral_core import MistralConfig
from mistral_core.errors import MeshError
from mistral_core.parameters import BODY, parameters
from mistral_core.sharding import Rules as Rules
from mistral_core.sharding import Sharding, Spec

from .layers import DecoderLayer, Embedding
from .quantize import move

Model = TypeVar("Model", bound=nnx.Module)
T = TypeVar("T")

LETTERS = {
    "q_proj": "BTN", "k_proj": "BTK", "v_proj": "BTK", "o_proj": "BTD", "gate_proj": "BTF", "up_proj": "BTF",
    "down_proj": "BTD", "lm_head": "BTV",
}  # fmt: skip
"""The axis letters of what a matrix gives, by the last part of its module's name."""


@dataclass(frozen=True)
class Placement:
    """A mesh, and the rules by which a model of a config is cut over it."""

    mesh: Mesh
    config: MistralConfig
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, config: MistralConfig, mesh: Mesh, rules: Rules | None = None) -> Placement:
        """The placement, checked; raises MeshError for a mesh that does not fit or whose axes are not automatic."""
        manual = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]
        if manual:
            raise MeshError(
                f"mesh must have automatic axes, got {', '.join(map(str, manual))} of another type; make it with "
                f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}."
            )
        found = Sharding.of(config, dict(mesh.shape), rules)
        return cls(mesh, config, tuple(sorted(found.rules.items())))

    @functools.cached_property
    def sharding(self) -> Sharding:
        """Which part of each array a device holds."""
        return Sharding(self.config, dict(self.mesh.shape), dict(self.rules))

    def parameter(self, name: str, architecture: str) -> NamedSharding:
        """Where a parameter goes, by its canonical name."""
        return self._named(self.sharding.parameter(_rows(self.config, architecture)[name]))

    def activation(self, letters: str, batch: int) -> NamedSharding:
        """Where an activation, or a cache, of these axis letters goes."""
        return self._named(self.sharding.activation(letters, {"B": batch}))

    def constrained(self, x: Array, letters: str) -> Array:
        """An activation of these axis letters, cut by the rules; axes after the letters are whole."""
        return jax.lax.with_sharding_constraint(x, self.activation(letters, x.shape[0]))

    def looked_up(self, x_BTD: Array) -> Array:
        """Embeddings as the parts of a table give them: its columns cut, and rows of the batch by what is left.

        From there to whole columns and all rows cut is one exchange; the compiler would gather the whole batch.
        """
        _, columns = self.sharding.parameter(BODY[0])
        rows, whole = self.sharding.activation("BT", {"B": x_BTD.shape[0]})
        rows = tuple(axis for axis in rows if axis not in columns)
        return jax.lax.with_sharding_constraint(x_BTD, self._named((rows, whole, columns)))

    def everywhere(self, tree: T) -> T:
        """Arrays that every device has whole, and so every process can read."""
        return jax.lax.with_sharding_constraint(tree, self._named(()))

    def _named(self, spec: Spec) -> NamedSharding:
        axes = [None if not each else each[0] if len(each) == 1 else each for each in spec]
        while axes and axes[-1] is None:  # one spelling of each sharding, for jit compares spellings
            axes.pop()
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@functools.lru_cache(maxsize=8)
def _rows(config: MistralConfig, architecture: str) -> dict[str, Any]:
    return dict(parameters(config, architecture))


class ShardedParam(nnx.Param[Array]):
    """A parameter that is cut wherever it is read, and whose gradient therefore is cut alike.

    `cut` is the sharding of one layer's array, `ndim_cut` that array's number of axes; of stacked layers none is cut.
    """

    def get_value(self, **index: Any) -> Array:
        """The array, or what an index picks of it."""
        value = super().get_value(**index)
        return self._cut(value) if value.shape == self.get_raw_value().shape else value

    def set_value(self, value: Array, **index: Any) -> None:
        """Let it hold an array, cut as the one before."""
        super().set_value(value if index else self._cut(value), **index)

    def _cut(self, value: Array) -> Array:
        where = _stacked(self.cut, value.ndim - self.ndim_cut)
        if not isinstance(value, jax.core.Tracer) and value.sharding == where:
            return value  # a constraint outside of a program copies
        return jax.lax.with_sharding_constraint(value, where)


def _stacked(where: NamedSharding, axes: int) -> NamedSharding:
    """The sharding of arrays that so many whole axes stack."""
    return NamedSharding(where.mesh, PartitionSpec(*(None,) * axes, *where.spec)) if axes and where.spec else where


def shard(model: Model, mesh: Mesh, rules: Rules | None = None) -> Model:
    """Cut a finished model over a mesh, in place, and return it: its parameters, and what its calls compute.

    `rules` say which mesh axes cut an axis letter, instead of `mistral_core.sharding.RULES`; a mesh whose axes are
    called data, fsdp and tensor needs none. Raises MeshError, with the sizes that would fit.
    """
    body = model.base_model
    placement = Placement.of(model.config.value, mesh, rules)
    for name, row in parameters(model.config.value, model.architecture):
        _place(model, name, len(row.axes), placement.parameter(name, model.architecture))
    _constrain(body.embed_tokens, placement, "BTD")
    for layer in body.layers.values() if isinstance(body.layers, nnx.Dict) else [body.layers]:
        for part in (layer.self_attn, layer.mlp):
            for name, letters in LETTERS.items():
                if hasattr(part, name):
                    _constrain(getattr(part, name), placement, letters)
        _constrain(layer, placement, "BTD")
    if getattr(model, "lm_head", None) is not None:
        _constrain(model.lm_head, placement, LETTERS["lm_head"])
    body.placement = placement
    return model


def _place(model: nnx.Module, name: str, ndim: int, where: NamedSharding) -> None:
    """Put a parameter where it goes; of stacked layers all with the first."""
    part, layer = model._part(name)
    if layer:
        return
    if model._is_packed(name):
        move(part, _stacked(where, 0 if layer is None else 1))
        return
    value = getattr(part, name.rpartition(".")[2]).get_value()
    value = jax.device_put(value, _stacked(where, value.ndim - ndim))
    setattr(part, name.rpartition(".")[2], ShardedParam(value, cut=where, ndim_cut=ndim))


def _constrain(part: nnx.Module, placement: Placement, letters: str) -> None:
    part.__class__ = _constrained(type(part))
    part.placement, part.letters = placement, letters


@functools.cache
def _constrained(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A class of module whose calls give what is cut by the rules."""
    if hasattr(kind, "unsharded"):
        return kind
    calls: dict[str, Any] = {"__call__": _layer_call(kind) if issubclass(kind, DecoderLayer) else _call(kind)}
    if issubclass(kind, Embedding):
        calls = {"__call__": _embedding_call(kind), "as_linear": _as_linear(kind)}
    return type(f"Sharded{kind.__name__}", (kind,), {"__module__": __name__, "unsharded": kind, **calls})


def _call(kind: type[Any]) -> Any:
    def call(self: Any, x: Array) -> Array:
        return self.placement.constrained(kind.__call__(self, x), self.letters)

    return call


def _embedding_call(kind: type[Any]) -> Any:
    def call(self: Any, ids_BT: Array) -> Array:
        x_BTD = self.placement.looked_up(kind.__call__(self, ids_BT))
        return self.placement.constrained(x_BTD, self.letters)

    return call


def _as_linear(kind: type[Any]) -> Any:
    def as_linear(self: Any, x: Array) -> Array:
        return self.placement.constrained(kind.as_linear(self, x), LETTERS["lm_head"])

    return as_linear


def _layer_call(kind: type[Any]) -> Any:
    def call(self: Any, x_BTD: Array, *others: Any, **options: Any) -> tuple[Array, Any, Any]:
        x_BTD, weights, kept = kind.__call__(self, x_BTD, *others, **options)
        if kept is not None:
            kept = tuple(self.placement.constrained(x, "BRK") for x in kept)
        return self.placement.constrained(x_BTD, self.letters), weights, kept

    return call
