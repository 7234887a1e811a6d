"""How Keras and TensorFlow save a finished model: their checkpoints, SavedModels, `.keras` files, copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Self

import keras
import tensorflow as tf
from tensorflow import Tensor

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.errors import UnsupportedFeatureError


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
        """What `from_config` makes the same model of, with fresh weights."""
        return {
            "config": self.config.to_dict(),
            "generation_config": self.generation_config.to_dict(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "trainable": [layer.trainable for layer in self._flatten_layers()],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """A model of what `get_config` returned."""
        policy = keras.dtype_policies.deserialize(config["dtype"])
        model = cls(MistralConfig.from_dict(config["config"]), dtype=policy, name=config["name"])
        model.generation_config = GenerationConfig.from_dict(config["generation_config"])
        for layer, trainable in zip(model._flatten_layers(), config["trainable"], strict=True):
            layer.trainable = trainable  # of those inside too, which come later
        return model


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
