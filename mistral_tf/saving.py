"""How Keras and TensorFlow save a finished model: their checkpoints, SavedModels, `.keras` files, copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Self

import keras
import ml_dtypes  # noqa: F401  (whose dtypes NumPy then knows by name)
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.parameters import parameters
from mistral_core.quantization.blocks import blocks
from mistral_core.quantization.matrix import PackedMatrix, packed_codes
from mistral_core.quantization.storage import Arrangement

from .lora import adapters_config, add_from_config, is_of_adapter
from .quantize import put
from .traces import portable


class SavedModel(keras.Model):
    """A Keras model of which nothing is lost, whichever way it is saved."""

    def export(
        self, filepath: Any, format: str = "tf_saved_model", *, input_signature: Any = None, **options: Any
    ) -> None:
        """Write a SavedModel whose endpoint `serve` maps a dictionary of inputs to one of outputs.

        The inputs are `input_ids` and `attention_mask` [B, T] of any size, or those of `input_signature` (a dictionary
        of `keras.InputSpec`); integers may be int32 or int64, each as it comes. The signature `serving_default` has
        them all in the dtypes asked for, int32 by default, and the endpoint and signature `int64_serving` all in
        int64. Raises UnsupportedFeatureError for another format.
        """
        if format != "tf_saved_model":
            raise UnsupportedFeatureError(f"export: format {format!r}; 'tf_saved_model' is the one there is.")
        if input_signature is None:
            names = ("input_ids", "attention_mask")
            input_signature = {name: keras.InputSpec("int32", [None, None], name=name) for name in names}
        specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in input_signature.items()}
        archive = keras.export.ExportArchive()
        archive.track(self)
        with portable():
            for name, endpoint in _endpoints(self._served, specs).items():
                archive.add_endpoint(name, endpoint)
            archive.write_out(filepath, **options)

    def _served(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return served(self.predict_step(inputs))

    def _trackable_children(self, save_type: str = "checkpoint", **options: Any) -> dict[str, Any]:
        """What TensorFlow's own checkpoints and SavedModels hold: parts that lie in a list or dictionary too.

        Keras does not show TensorFlow what lies in one, and the decoder layers do.
        """
        children = super()._trackable_children(save_type, **options)
        seen = {id(child) for child in children.values()}
        for name in sorted(vars(self), key=lambda name: name.startswith("_")):  # Keras' own lists come last
            for path, part in _parts_inside(name, vars(self)[name]):
                if id(part) not in seen:
                    children[path] = part
                    seen.add(id(part))
        return children

    def __dir__(self) -> list[str]:
        """All names but `base_model`: Keras saves what it finds by them, and the body has a name of its own."""
        return [name for name in super().__dir__() if name != "base_model"]

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the same model of, with fresh weights.

        Raises UnsupportedFeatureError where an adapter is merged.
        """
        return {
            "config": self.config.to_dict(),
            "generation_config": self.generation_config.to_dict(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "quantization": {name: how._asdict() for name, how in self.arrangements().items()},
            "trainable": [layer.trainable for layer in self._flatten_layers() if not is_of_adapter(layer)],
            "adapters": adapters_config(self),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """A model of what `get_config` returned; packed matrices are as before, of zeros."""
        policy, packed = keras.dtype_policies.deserialize(config["dtype"]), config.get("quantization") or {}
        options = {"initializer": empty} if packed else {}
        model = cls(MistralConfig.from_dict(config["config"]), dtype=policy, name=config["name"], **options)
        for name, arrangement in packed.items():
            put(model, name, _of_zeros(Arrangement(**arrangement)))
        if packed:
            _draw_floats(model)
        model.generation_config = GenerationConfig.from_dict(config["generation_config"])
        for layer, trainable in zip(model._flatten_layers(), config["trainable"], strict=True):
            layer.trainable = trainable  # of those inside too, which come later
        add_from_config(model, config.get("adapters") or {})
        return model


def empty(shape: Any, dtype: Any) -> Any:
    """Memory that nobody has touched yet: it costs nothing until a checkpoint's own takes its place."""
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)


def _of_zeros(arrangement: Arrangement) -> PackedMatrix:
    """A matrix that is packed so."""
    shape, block = tuple(arrangement.shape), tuple(arrangement.block)
    codes = packed_codes(arrangement.kind, np.zeros(shape, np.uint8))
    scale = np.zeros(blocks(shape, block), arrangement.scale)
    zero = None if arrangement.symmetric else np.zeros(scale.shape, np.int8)
    return PackedMatrix(arrangement.kind, codes, scale, zero, shape, block)


def _draw_floats(model: Any) -> None:
    """Fresh values for the matrices that are not packed."""
    initializer = keras.initializers.RandomNormal(stddev=model.config.initializer_range)
    packed = dict(model.packed_parts())
    for name, row in parameters(model.config, model.architecture):
        if len(row.axes) == 2 and name not in packed:
            variable = model._parameter(name)
            variable.assign(initializer(variable.shape, variable.dtype))


def served(output: Any) -> dict[str, Tensor]:
    """An output as named tensors: those of all layers are one, layers first; the cache is left out."""
    there = dict(output if isinstance(output, dict) else output._asdict())
    there.pop("past_key_values", None)
    return {
        name: tf.stack(value) if isinstance(value, tuple) else value
        for name, value in there.items()
        if value is not None
    }


_OTHER = {tf.int32: tf.int64, tf.int64: tf.int32}


def _endpoints(function: Any, specs: dict[str, tf.TensorSpec]) -> dict[str, Any]:
    """`serve`, a function of these inputs that takes every mixture of int32 and int64, and `int64_serving`.

    The function itself is traced once. Servers see the trace that comes first.
    """
    traced = tf.function(function, input_signature=[specs], autograph=False)
    either = {
        name: [tf.TensorSpec(spec.shape, dtype, name) for dtype in (spec.dtype, _OTHER.get(spec.dtype)) if dtype]
        for name, spec in specs.items()
    }
    in_int64 = [max(some, key=lambda spec: spec.dtype == tf.int64) for some in either.values()]
    traces = {"serve": list(itertools.product(*either.values()))}
    if any(len(some) > 1 for some in either.values()):
        traces["int64_serving"] = [in_int64]

    def cast(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return traced({name: tf.cast(value, specs[name].dtype) for name, value in inputs.items()})

    endpoints = {name: tf.function(cast, autograph=False) for name in traces}
    for name, signatures in traces.items():
        for signature in signatures:
            endpoints[name].get_concrete_function(dict(zip(specs, signature, strict=True)))
    return endpoints


def _parts_inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Layers and variables that lie in a list or dictionary, however deep, each by its path."""
    inside = enumerate(value) if isinstance(value, list | tuple) else value.items() if isinstance(value, dict) else ()
    for key, part in inside:
        if isinstance(part, keras.layers.Layer | keras.Variable):
            yield f"{path}-{key}", part
        else:
            yield from _parts_inside(f"{path}-{key}", part)
