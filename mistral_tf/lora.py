"""LoRA adapters in a finished model: a guest of which layers.py and model.py know nothing.

Files are peft's (`mistral_core.lora`); this is the same in every framework. An adapter computes in float32 beside a
base that is frozen and may be packed (QLoRA, arXiv 2305.14314). Its tensors are weights of layers inside the parts that
they change: `fit` trains them alone, and Keras' files have them beside the base.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core.errors import UnsupportedFeatureError
from mistral_core.lora import adapter as files
from mistral_core.lora import models
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig as LoraConfig
from mistral_core.lora.config import LoraTarget
from mistral_core.parameters import parameters, shape_of

from .arrays import to_numpy
from .checkpointing import drawn_seed
from .layers import Embedding, Head, Layer, Linear
from .products import product
from .quantize import QuantizedLinear

Model = TypeVar("Model", bound=keras.Model)


class LowRank(Layer):
    """What one adapter adds to one matrix: scaling times b a, and of DoRA the lengths of rows."""

    def __init__(self, weights: LoraWeights, scaling: float, dropout: float, *, name: str | None = None) -> None:
        super().__init__(dtype="float32", name=name)
        self.scaling, self.dropout = scaling, dropout
        self.number = zlib.crc32(self.name.encode()) % 2**31  # of a layer's seed, each part and adapter has its own
        self.a = self._kept("a", weights.a)
        self.b = self._kept("b", weights.b)
        lengths = weights.magnitude
        self.magnitude = None if lengths is None else self._kept("magnitude", lengths)

    def _kept(self, name: str, array: np.ndarray) -> keras.Variable:
        return self.add_weight(
            shape=array.shape, initializer=lambda shape, dtype: tf.constant(array, dtype), autocast=False,
            name=f"{self.name}.{name}",
        )  # fmt: skip

    def call(self, x: Tensor, y: Tensor, weight: Any, training: bool = False) -> Tensor:
        """What is added to y = x W^T, in float32; the lengths of rows of W + s b a are constants to gradients."""
        a, b = tf.convert_to_tensor(self.a), tf.convert_to_tensor(self.b)
        seed = drawn_seed(self.number, training) if self.dropout else None
        dropped = tf.cast(x, a.dtype)
        if seed is not None:
            dropped = tf.nn.experimental.stateless_dropout(dropped, self.dropout, seed)
        z = product(product(dropped, a), b) * self.scaling
        if self.magnitude is None or weight is None:
            return z
        wide = tf.cast(weight, a.dtype)
        changed = wide + self.scaling * product(b, tf.transpose(a))
        factor = tf.convert_to_tensor(self.magnitude) / tf.stop_gradient(tf.norm(changed, axis=1))
        base = tf.cast(y, a.dtype) if seed is None else product(dropped, wide)
        return (factor - 1) * base + factor * z


class _Named(Layer):
    """Layers by name: TensorFlow's checkpoints find what is in a layer, and nothing that is in a dictionary."""

    def __getitem__(self, name: str) -> Any:
        return dict(self.items())[name]

    def __setitem__(self, name: str, part: Layer) -> None:
        setattr(self, f"of_{name}", part)

    def __contains__(self, name: object) -> bool:
        return f"of_{name}" in vars(self)

    def items(self) -> list[tuple[str, Any]]:
        return [(key.removeprefix("of_"), part) for key, part in vars(self).items() if key.startswith("of_")]


class Adapted(Layer):
    """A part of a model with adapters of its own, by name; those in `active` are added, one after another."""

    lora: _Named
    saved: _Named
    """Copies of the whole part, each of which takes its place while its adapter is active."""
    unmerged: Mapping[str, Tensor]
    """The part's own parameters, as they were before adapters were folded into them."""
    active: tuple[str, ...]
    merged: tuple[str, ...]
    """The adapters that are folded into the weight."""

    @property
    def adds(self) -> tuple[str, ...]:
        """The adapters with which a call computes more than the part's own weights."""
        return tuple(name for name in self.active if name not in self.merged)

    def _own(self, x: Tensor) -> Tensor:
        for name in reversed(self.adds):
            if name in self.saved:
                is_ids = x.dtype.is_integer
                y = self.saved[name](x if is_ids else _wide(x))
                return y if is_ids or getattr(self, "is_head", isinstance(self, Head)) else tf.cast(y, x.dtype)
        return super().call(x)

    def _each(self) -> Iterator[LowRank]:
        return (self.lora[name] for name in self.adds if name in self.lora)


class AdaptedLinear(Adapted, Linear):
    """x W^T, and what adapters add to it."""

    def call(self, x: Tensor) -> Tensor:
        y = self._own(x)
        result = _wide(y)
        bare = y if self.bias is None else y - tf.cast(self.bias, y.dtype)
        for low in self._each():
            weight = None if low.magnitude is None else tf.convert_to_tensor(self.weight)
            result = result + tf.cast(low(x, bare, weight=weight), result.dtype)
        return tf.cast(result, y.dtype)


class AdaptedHead(AdaptedLinear, Head):
    """A head, and what adapters add to it."""


class AdaptedQuantizedLinear(Adapted, QuantizedLinear):
    """The product with a packed matrix, and what adapters add to it."""

    call = AdaptedLinear.call


class AdaptedEmbedding(Adapted, Embedding):
    """The embeddings of tokens, and what adapters add to them."""

    def call(self, ids: Tensor) -> Tensor:
        y = self._own(ids)
        result = _wide(y)
        for low in self._each():
            picked, a = tf.gather(tf.convert_to_tensor(low.b), ids), tf.convert_to_tensor(low.a)
            result = result + tf.cast(product(picked, tf.transpose(a)) * low.scaling, result.dtype)
        return tf.cast(result, y.dtype)


_KINDS: Mapping[type[Layer], type[Layer]] = {
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
            model.set_parameter(each, array.astype(model._parameter(each).dtype))
    return _put(model, found, name, trains=is_trainable)


def save_adapter(model: keras.Model, directory: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write an adapter as peft does, in one atomic step; raises ConfigError for a name that is not there."""
    files.save(directory, adapter_of(model, name), model.config.value, model.architecture)


def adapter_of(model: keras.Model, name: str = "default") -> Adapter:
    """An adapter's numbers in NumPy; raises ConfigError for a name that is not there."""
    lora, weights, saved = _config(model, name), {}, {}
    for each in lora.targets(model.config.value, model.architecture):
        weights[each] = _weights(model._module(each).lora[name])
    for each, _ in lora.saved(model.config.value, model.architecture):
        saved[each] = _numbers(getattr(model._module(each).saved[name], each.rpartition(".")[2]))
    return Adapter(lora, weights, saved)


def set_adapter(model: keras.Model, names: str | Sequence[str]) -> None:
    """Let these adapters compute and train, and no others; raises ConfigError for a name that is not there."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _config(model, name)
    models.refuse_merged(list(_parts(model)))
    for part in _parts(model):
        part.active = names
    for name, low in _lows(model):
        low.trainable = name in names


def trained_adapters(model: keras.Model) -> tuple[str, ...]:
    """The names of the adapters that train."""
    trains = {name for name, low in _lows(model) if low.trainable}
    return tuple(name for name in _configs(model) if name in trains)


@contextlib.contextmanager
def disable_adapter(model: keras.Model) -> Iterator[None]:
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
        part.unmerged = {each: tf.identity(variable) for each, variable in own.items()}
        for each in part.active:
            if each in part.saved:
                for field, variable in own.items():
                    variable.assign(tf.cast(getattr(part.saved[each], field), variable.dtype))
            if each in part.lora:
                low = part.lora[each]
                part.weight.assign(files.folded(to_numpy(part.weight), _weights(low), low.scaling))
        part.merged = part.active
    return model


def unmerge(model: Model) -> Model:
    """Put back the weights as they were before `merge`, bit for bit, and return the model."""
    for part in _parts(model):
        for each, value in part.unmerged.items():
            getattr(part, each).assign(value)
        part.unmerged, part.merged = {}, ()
    return model


def adapters_config(model: keras.Model) -> dict[str, Any]:
    """What `add_from_config` gives a model the same adapters of; raises UnsupportedFeatureError where one is merged."""
    parts = list(_parts(model))
    merged = [name for part in parts for name in part.merged]
    if merged:
        raise UnsupportedFeatureError(
            f"the adapter {merged[0]} is merged, and Keras' files have adapters beside the base; call unmerge(model) "
            "first, or write the merged weights by save_pretrained."
        )
    found = {}
    for name, lora in _configs(model).items():
        lows = [each[name] for part in parts for each in (part.lora, part.saved) if name in each]
        active, trains = any(name in part.active for part in parts), any(low.trainable for low in lows)
        found[name] = {"config": lora.to_dict(), "active": active, "trains": trains}
    return found


def add_from_config(model: Model, config: Mapping[str, Any]) -> Model:
    """Give a model the adapters of which `adapters_config` told, of zeros, and return it."""
    for name, told in config.items():
        lora, weights = LoraConfig.from_dict(told["config"]), {}
        for each, target in _targets(model, lora).items():
            rows, columns = shape_of(target.row, model.config)
            lengths = np.zeros(rows, np.float32) if lora.use_dora else None
            a, b = np.zeros((target.r, columns), np.float32), np.zeros((rows, target.r), np.float32)
            weights[each] = LoraWeights(a, b, lengths)
        rows_saved = lora.saved(model.config.value, model.architecture)
        saved = {each: np.zeros(shape_of(row, model.config), np.float32) for each, row in rows_saved}
        _put(model, Adapter(lora, weights, saved), name, trains=told["trains"])
    for part in _parts(model):
        part.active = tuple(name for name, told in config.items() if told["active"])
    for name, low in _lows(model):
        low.trainable = config[name]["trains"]
    return model


def is_of_adapter(layer: keras.layers.Layer) -> bool:
    """Whether a layer is there for adapters alone."""
    return ".lora" in layer.name or ".saved" in layer.name


def _weights(low: LowRank) -> LoraWeights:
    magnitude = None if low.magnitude is None else _numbers(low.magnitude)
    return LoraWeights(_numbers(low.a), _numbers(low.b), magnitude)


def _targets(model: keras.Model, lora: LoraConfig) -> dict[str, LoraTarget]:
    return lora.targets(model.config.value, model.architecture)


def _put(model: Model, adapter: Adapter, name: str, *, trains: bool) -> Model:
    configs = _configs(model)
    models.check_new(name, configs)
    targets = _targets(model, adapter.config)
    wanted = {each: model._module(each) for each in (*targets, *adapter.saved)}
    for each, part in wanted.items():
        if type(part) not in _KINDS and not isinstance(part, Adapted):
            models.refuse_part(each, part)
    models.refuse_merged(list(_parts(model)))
    if not configs:
        _freeze(model)
    with model.distribute_strategy.scope():
        for part in wanted.values():
            _adapt(part)
        for each, target in targets.items():
            part, weights = wanted[each], adapter.weights[each]
            with tf.device(_device(part)):
                part.lora[name] = LowRank(
                    weights, target.scaling, adapter.config.lora_dropout, name=f"{part.name}.lora.{name}"
                )
        for each, array in adapter.saved.items():
            part, attribute = wanted[each], each.rpartition(".")[2]
            with tf.device(_device(part)):
                if name not in part.saved:
                    part.saved[name] = _copy(part, name)
            getattr(part.saved[name], attribute).assign(array.astype(np.float32))
    model.peft_configs = (*configs.items(), (name, adapter.config))
    for part in _parts(model):
        part.active = (name,)
    for other, low in _lows(model):
        low.trainable = other == name and trains
    return model


def _freeze(model: keras.Model) -> None:
    """Let nothing that a model has train; its layers may, for adapters lie inside."""
    for weight in model.weights:
        weight.trainable = False


def _adapt(part: Layer) -> None:
    if isinstance(part, Adapted):
        return
    part.__class__ = _KINDS[type(part)]
    part.lora = _Named(dtype="float32", name=f"{part.name}.lora")
    part.saved = _Named(dtype="float32", name=f"{part.name}.saved")
    part.active = part.merged = ()
    part.unmerged = {}


def _copy(part: Any, name: str) -> Layer:
    """A part of the same kind without adapters, which an adapter has of its own."""
    rows, columns = part.shape if isinstance(part, QuantizedLinear) else part.weight.shape
    compute = part.compute_dtype
    options = {"initializer": "zeros", "name": f"{part.name}.saved.{name}"}
    if isinstance(part, Embedding):
        policy = f"mixed_{compute}" if compute in ("bfloat16", "float16") else compute
        return Embedding(rows, columns, dtype=policy, **options)
    kind = Head if isinstance(part, Head) or getattr(part, "is_head", False) else Linear
    return kind(columns, rows, bias=part.bias is not None, dtype="float32", **options)


def _wide(y: Tensor) -> Tensor:
    """At least float32, in which adapters add."""
    return tf.cast(y, tf.float64 if y.dtype == tf.float64 else tf.float32)


def _numbers(variable: keras.Variable) -> np.ndarray:
    return to_numpy(variable).astype(np.float32)


def _device(part: Layer) -> str:
    return tf.convert_to_tensor(part.weights[0]).device


def _lows(model: keras.Model) -> Iterator[tuple[str, Any]]:
    """(name of an adapter, what it has of one part) of all parts."""
    return (pair for part in _parts(model) for pair in (*part.lora.items(), *part.saved.items()))


def _parts(model: keras.Model) -> Iterator[Any]:
    return (part for _, part in _named_parts(model))


def _named_parts(model: Any) -> Iterator[tuple[str, Any]]:
    found = {}
    for name, _ in parameters(model.config, model.architecture):
        part = model._module(name)
        if isinstance(part, Adapted):
            found[id(part)] = (name.rpartition(".")[0], part)
    return iter(found.values())


def _configs(model: Any) -> dict[str, LoraConfig]:
    return dict(getattr(model, "peft_configs", ()))


def _config(model: keras.Model, name: str) -> LoraConfig:
    return models.named(name, _configs(model))


def _refuse_merging(model: Any, name: str, part: Any) -> None:
    is_packed, is_embedding = isinstance(part, QuantizedLinear), isinstance(part, Embedding)
    models.refuse_merging(model, name, part, is_packed=is_packed, is_embedding=is_embedding)
