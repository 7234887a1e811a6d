"""LoRA adapters in a finished model: a guest of which layers.py and model.py know nothing.

Files are peft's (`mistral_core.lora`); this is the same in every framework. An adapter computes in float32 beside a
base that is frozen and may be packed (QLoRA, arXiv 2305.14314). What trains is an `nnx.LoRAParam`, by which gradients
and optimizers are told what they are of; the base stays `nnx.Param`, and `params` and `bind` mean it alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core.errors import UnsupportedFeatureError
from mistral_core.lora import adapter as files
from mistral_core.lora import models
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig as LoraConfig
from mistral_core.lora.config import LoraTarget

from .arrays import from_numpy, to_numpy
from .layers import Embedding, Head, Linear
from .products import product
from .quantize import QuantizedLinear

Model = TypeVar("Model", bound=nnx.Module)

_KEY: contextvars.ContextVar[Any] = contextvars.ContextVar("key", default=None)
"""The key for dropout of the layer that is computing; None: nothing is dropped."""


class Frozen(nnx.Variable[Array]):
    """An array of an adapter that does not train, or of a base before it was merged: gradients pass it by."""


class LowRank(nnx.Module):
    """What one adapter adds to one matrix: scaling times b a, and of DoRA the lengths of rows."""

    def __init__(self, weights: LoraWeights, scaling: float, dropout: float, *, name: str) -> None:
        self.scaling, self.dropout = scaling, dropout
        self.number = zlib.crc32(name.encode())  # of a layer's key, each part and adapter has its own
        self.a = nnx.LoRAParam(from_numpy(weights.a))
        self.b = nnx.LoRAParam(from_numpy(weights.b))
        lengths = weights.magnitude
        self.magnitude = None if lengths is None else nnx.LoRAParam(from_numpy(lengths))

    def __call__(self, x: Array, y: Array, weight: Any) -> Array:
        """What is added to y = x W^T, in float32; the lengths of rows of W + s b a are constants to gradients."""
        a, b = self.a[...], self.b[...]
        key = _KEY.get() if self.dropout else None
        dropped = x.astype(a.dtype)
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, np.uint32(self.number)), 1 - self.dropout, x.shape)
            dropped = jnp.where(kept, dropped / (1 - self.dropout), 0)
        z = product(product(dropped, a), b) * self.scaling
        if self.magnitude is None or weight is None:
            return z
        wide = weight[...].astype(a.dtype)
        changed = wide + self.scaling * product(b, a.T)
        factor = self.magnitude[...] / jax.lax.stop_gradient(jnp.linalg.norm(changed, axis=1))
        factor = jnp.broadcast_to(factor, z.shape)
        base = y.astype(a.dtype) if key is None else product(dropped, wide)
        return (factor - 1) * base + factor * z


class Adapted(nnx.Module):
    """A part of a model with adapters of its own, by name; those in `active` are added, one after another."""

    lora: nnx.Dict
    saved: nnx.Dict
    """Copies of the whole part, each of which takes its place while its adapter is active."""
    unmerged: nnx.Dict
    """The part's own parameters, as they were before adapters were folded into them."""
    active: tuple[str, ...]
    merged: tuple[str, ...]
    """The adapters that are folded into the weight."""

    @property
    def adds(self) -> tuple[str, ...]:
        """The adapters with which a call computes more than the part's own weights."""
        return tuple(name for name in self.active if name not in self.merged)

    def _own(self, x: Array) -> Array:
        for name in reversed(self.adds):
            if name in self.saved:
                is_ids = jnp.issubdtype(x.dtype, jnp.integer)
                y = self.saved[name](x if is_ids else _wide(x))
                return y if is_ids or getattr(self, "is_head", isinstance(self, Head)) else y.astype(x.dtype)
        return super().__call__(x)

    def _each(self) -> Iterator[LowRank]:
        return (self.lora[name] for name in self.adds if name in self.lora)


class AdaptedLinear(Adapted, Linear):
    """x W^T, and what adapters add to it."""

    def __call__(self, x: Array) -> Array:
        y = self._own(x)
        result = _wide(y)
        bare = y if self.bias is None else y - jnp.broadcast_to(self.bias[...].astype(y.dtype), y.shape)
        for low in self._each():
            added = low(x, bare, None if low.magnitude is None else self.weight)
            result = result + added.astype(result.dtype)
        return result.astype(y.dtype)


class AdaptedHead(AdaptedLinear, Head):
    """A head, and what adapters add to it."""


class AdaptedQuantizedLinear(Adapted, QuantizedLinear):
    """The product with a packed matrix, and what adapters add to it."""

    __call__ = AdaptedLinear.__call__


class AdaptedEmbedding(Adapted, Embedding):
    """The embeddings of tokens, and what adapters add to them."""

    def __call__(self, ids: Array) -> Array:
        y = self._own(ids)
        result = _wide(y)
        for low in self._each():
            picked = jnp.take(low.b[...], ids, axis=0, mode="fill")
            result = result + (product(picked, low.a[...].T) * low.scaling).astype(result.dtype)
        return result.astype(y.dtype)


_KINDS: Mapping[type[nnx.Module], type[nnx.Module]] = {
    Linear: AdaptedLinear,
    Head: AdaptedHead,
    QuantizedLinear: AdaptedQuantizedLinear,
    Embedding: AdaptedEmbedding,
}
"""Classes of parts -> the class of the same part with adapters."""


def add_adapter(model: Model, config: LoraConfig | None = None, *, name: str = "default", seed: int = 0) -> Model:
    """Give a model a fresh adapter, which alone trains, in place, and return it; without a config peft's defaults.

    Every framework begins with the same numbers for a seed. Raises ConfigError, UnsupportedFeatureError.
    """
    return _put(model, models.fresh(model, config, seed=seed), name, trains=True)


def load_adapter(
    model: Model, path: str | os.PathLike[str], *, name: str = "default", is_trainable: bool = False
) -> Model:
    """Give a model the adapter of a directory that peft, or any framework here, wrote, in place, and return it.

    Raises what `mistral_core.lora.adapter.load` raises, ConfigError for a name that is there.
    """
    found = files.load(path, model.config.value, model.architecture)
    for each, array in found.base.items():
        if not model._is_packed(each):
            dtype = model._parameter(each)[0].get_value().dtype
            model.set_parameter(each, array.astype(dtype), device=model.device)
    return _put(model, found, name, trains=is_trainable)


def save_adapter(model: nnx.Module, directory: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write an adapter as peft does, in one atomic step; raises ConfigError for a name that is not there."""
    files.save(directory, adapter_of(model, name), model.config.value, model.architecture)


def adapter_of(model: nnx.Module, name: str = "default") -> Adapter:
    """An adapter's numbers in NumPy; raises ConfigError for a name that is not there."""
    lora, weights, saved = _config(model, name), {}, {}
    for each in lora.targets(model.config.value, model.architecture):
        weights[each] = _weights(_part(model, each).lora[name])
    for each, _ in lora.saved(model.config.value, model.architecture):
        saved[each] = _numbers(getattr(_part(model, each).saved[name], each.rpartition(".")[2]))
    return Adapter(lora, weights, saved)


def set_adapter(model: nnx.Module, names: str | Sequence[str]) -> None:
    """Let these adapters compute and train, and no others; raises ConfigError for a name that is not there."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _refuse_dropout(_config(model, name), model)
    models.refuse_merged(list(_parts(model)))
    for part in _parts(model):
        part.active = names
    for name, low in _lows(model):
        _let_train(low, name in names)


def trained_adapters(model: nnx.Module) -> tuple[str, ...]:
    """The names of the adapters that train."""
    trains = {name for name, low in _lows(model) if any(isinstance(each, nnx.LoRAParam) for each in vars(low).values())}
    return tuple(name for name in _configs(model) if name in trains)


@contextlib.contextmanager
def disable_adapter(model: nnx.Module) -> Iterator[None]:
    """A context in which a model computes without its adapters."""
    with models.disabled(list(_parts(model))):
        yield


def merge(model: Model) -> Model:
    """Fold the active adapters into the weights of a model of floats, in place, and return it; `unmerge` undoes it.

    Weights are rounded once to their dtype. Raises UnsupportedFeatureError for packed matrices, into which a change may
    vanish, and where one tensor is embedding and head.
    """
    parts = [(name, part) for name, part in _named_parts(model) if part.active and not part.merged]
    for name, part in parts:
        _refuse_merging(model, name, part)
    for _, part in parts:
        own = {each: getattr(part, each) for each in ("weight", "bias") if getattr(part, each, None) is not None}
        part.unmerged = nnx.Dict({each: Frozen(variable.get_value()) for each, variable in own.items()})
        for each in part.active:
            if each in part.saved:
                for field, variable in own.items():
                    saved = getattr(part.saved[each], field).get_value()
                    variable.set_value(saved.astype(variable.get_value().dtype))
            if each in part.lora:
                low, before = part.lora[each], part.weight.get_value()
                folded = files.folded(to_numpy(before), _weights(low), low.scaling)
                part.weight.set_value(jax.device_put(from_numpy(folded), before.device))
        part.merged = part.active
    return model


def unmerge(model: Model) -> Model:
    """Put back the weights as they were before `merge`, bit for bit, and return the model."""
    for part in _parts(model):
        for each, variable in part.unmerged.items():
            getattr(part, each).set_value(variable.get_value())
        part.unmerged, part.merged = nnx.Dict(), ()
    return model


def _weights(low: LowRank) -> LoraWeights:
    magnitude = None if low.magnitude is None else _numbers(low.magnitude)
    return LoraWeights(_numbers(low.a), _numbers(low.b), magnitude)


def _targets(model: nnx.Module, lora: LoraConfig) -> dict[str, LoraTarget]:
    return lora.targets(model.config.value, model.architecture)


def _put(model: Model, adapter: Adapter, name: str, *, trains: bool) -> Model:
    configs = _configs(model)
    models.check_new(name, configs)
    if trains:
        _refuse_dropout(adapter.config, model)
    targets = _targets(model, adapter.config)
    wanted = {each: _part(model, each) for each in (*targets, *adapter.saved)}
    for each, part in wanted.items():
        if not isinstance(part, Adapted) and _adapted(type(part)) is None:
            models.refuse_part(each, part)
    models.refuse_merged(list(_parts(model)))
    for part in wanted.values():
        _adapt(part)
    for each, target in targets.items():
        part, place = wanted[each], f"{each.split('.')[-2]}.{name}"
        part.lora[name] = LowRank(adapter.weights[each], target.scaling, adapter.config.lora_dropout, name=place)
    for each, array in adapter.saved.items():
        part, attribute = wanted[each], each.rpartition(".")[2]
        if name not in part.saved:
            part.saved[name] = _copy(part)
        setattr(part.saved[name], attribute, nnx.LoRAParam(from_numpy(array.astype(np.float32))))
    if adapter.config.lora_dropout:
        for layer in model.base_model.layers.values():
            layer.__class__ = _keyed(type(layer))
    model.peft_configs = (*configs.items(), (name, adapter.config))
    for part in _parts(model):
        part.active = (name,)
    for other, low in _lows(model):
        _let_train(low, other == name and trains)
    return model


def _adapt(part: nnx.Module) -> None:
    if isinstance(part, Adapted):
        return
    part.__class__ = _adapted(type(part))
    part.lora, part.saved, part.unmerged = nnx.Dict(), nnx.Dict(), nnx.Dict()
    part.active = part.merged = ()


@functools.cache
def _adapted(kind: type[nnx.Module]) -> type[nnx.Module] | None:
    """The class of a part with adapters, of one that is cut over a mesh too; None for a class that is not ours."""
    unsharded = getattr(kind, "unsharded", None)
    if unsharded is None:
        return _KINDS.get(kind)
    if unsharded not in _KINDS:
        return None
    return type(f"Adapted{kind.__name__}", (_KINDS[unsharded], kind), {"__module__": __name__})


@functools.cache
def _keyed(kind: type[Any]) -> type[Any]:
    """The class of a layer whose parts know its key for dropout."""
    if hasattr(kind, "without_key"):
        return kind

    def call(self: Any, *arrays: Any, rngs: Any = None) -> Any:
        token = _KEY.set(rngs)
        try:
            return kind.__call__(self, *arrays, rngs=rngs)
        finally:
            _KEY.reset(token)

    return type(f"Keyed{kind.__name__}", (kind,), {"__module__": __name__, "without_key": kind, "__call__": call})


def _copy(part: Any) -> nnx.Module:
    """A part of the same kind without adapters, which an adapter has of its own."""
    rows, columns = part.shape if isinstance(part, QuantizedLinear) else part.weight.shape
    kind = Head if isinstance(part, Head) or getattr(part, "is_head", False) else Linear

    def fresh() -> nnx.Module:
        options = {"param_dtype": jnp.float32, "rngs": nnx.Rngs(0), "std": 0.0}
        if isinstance(part, Embedding):
            return Embedding(rows, columns, dtype=part.dtype, **options)
        return kind(columns, rows, bias=part.bias is not None, **options)

    return nnx.eval_shape(fresh)


def _let_train(low: nnx.Module, trains: bool) -> None:
    """Let the arrays of an adapter be what filters for gradients and optimizers find, or pass by."""
    kind = nnx.LoRAParam if trains else Frozen
    for name, variable in list(vars(low).items()):
        if isinstance(variable, nnx.Variable) and type(variable) is not kind:
            setattr(low, name, kind(variable.get_value()))


def _wide(y: Array) -> Array:
    """At least float32, in which adapters add."""
    return y.astype(jnp.float64 if y.dtype == jnp.float64 else jnp.float32)


def _numbers(variable: nnx.Variable[Array]) -> np.ndarray:
    return to_numpy(variable.get_value()).astype(np.float32)


def _part(model: Any, name: str) -> Any:
    """The part of the model that has a matrix; raises UnsupportedFeatureError where layers are stacked."""
    part, layer = model._part(name)
    if layer is not None:
        raise UnsupportedFeatureError(
            f"{name} must be an array of its own to be adapted, merged or saved, and is stacked; call "
            "unscan_layers(model) first, and scan_layers(model) again."
        )
    return part


def _lows(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(name of an adapter, what it has of one part) of all parts."""
    return (pair for part in _parts(model) for pair in (*part.lora.items(), *part.saved.items()))


def _parts(model: nnx.Module) -> Iterator[Any]:
    return (part for _, part in _named_parts(model))


def _named_parts(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    found = [(".".join(map(str, path)), part) for path, part in nnx.iter_graph(model) if isinstance(part, Adapted)]
    return iter(found)


def _configs(model: Any) -> dict[str, LoraConfig]:
    return dict(getattr(model, "peft_configs", ()))


def _config(model: nnx.Module, name: str) -> LoraConfig:
    return models.named(name, _configs(model))


def _refuse_dropout(lora: LoraConfig, model: Any) -> None:
    """Raise UnsupportedFeatureError where inputs of a head would be dropped: a call's keys go to its layers."""
    outside = [each for each, target in _targets(model, lora).items() if target.row.kind != "embedding"]
    outside = [each for each in outside if ".layers." not in each]
    if lora.lora_dropout and outside:
        raise UnsupportedFeatureError(
            f"lora_dropout must be 0 to train {outside[0]} in JAX, whose heads have no keys for dropout, got "
            f"{lora.lora_dropout}; leave the head out of target_modules, or set it to 0."
        )


def _refuse_merging(model: Any, name: str, part: Any) -> None:
    if not isinstance(model.base_model.layers, nnx.Dict):
        raise UnsupportedFeatureError("merge: the layers are stacked; call unscan_layers(model) first.")
    is_packed, is_embedding = isinstance(part, QuantizedLinear), isinstance(part, Embedding)
    models.refuse_merging(model, name, part, is_packed=is_packed, is_embedding=is_embedding)
