"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.parameters import BASE_PREFIX, parameters
from mistral_core.weights import pretrained

from .arrays import as_dtype, to_numpy


class PreTrainedModel(keras.Model):
    """A Mistral class: its config, and its way to and from checkpoints."""

    def __init__(self, config: MistralConfig, *, dtype: Any = "float32") -> None:
        super().__init__(dtype=as_dtype(dtype).name, autocast=False)
        self.built = True
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)

    def __call__(self, *arrays: Any, **options: Any) -> Any:
        """Call with lists, NumPy arrays or tensors; Keras takes no lists by position."""
        names = list(inspect.signature(self.call).parameters)
        given = {**dict(zip(names, arrays, strict=False)), **options}
        return super().__call__(**given)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: str | None = None,
        attn_implementation: str = "eager",
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only) and fields of the config to
        replace. A head that the file lacks is initialised from `seed` with one warning. Raises CheckpointError,
        ConfigError or HubError and their kind.
        """
        loaded = pretrained.load(
            path,
            cls.__name__,
            config=config,
            dtype=None if dtype is None else _name(dtype),
            seed=seed,
            verify=verify,
            **options,
        )
        with tf.device(device):
            model = cls(
                loaded.config,
                attn_implementation=attn_implementation,
                dtype=loaded.config.dtype or "float32",
                initializer="zeros",
            )
            for name, array in loaded.tensors:
                model.set_parameter(name, array)
                del array  # before the next one comes
        model.generation_config = loaded.generation_config
        return model

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, max_shard_size: str | int = "5GB", overwrite: bool = True
    ) -> None:
        """Write config, generation config and safetensors in one atomic step, verified before the swap.

        Files of other kinds that are already there stay. Raises ConversionError and its kind.
        """
        pretrained.save(
            directory,
            self.config,
            self.named_arrays(),
            architecture=type(self).__name__,
            generation_config=self.generation_config,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )

    def named_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (canonical name, NumPy array) of every tensor of the model, in table order."""
        for name, _ in parameters(self.config, type(self).__name__):
            yield name, to_numpy(self._parameter(name))

    def set_parameter(self, name: str, array: np.ndarray) -> None:
        """Let the parameter of this canonical name hold an array."""
        self._parameter(name).assign(array)

    def load_arrays(self, arrays: Any) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, type(self).__name__):
            self.set_parameter(name, arrays[name])
        return self

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _parameter(self, name: str) -> keras.Variable:
        """The bare model's own names lack the `model.` in front."""
        path = name.removeprefix(BASE_PREFIX) if type(self).__name__ == "MistralModel" else name
        return functools.reduce(_child, path.split("."), self)


def _child(node: Any, key: str) -> Any:
    if key.isdecimal():
        return node[int(key)]
    return getattr(node, "decoder_layers" if key == "layers" else key)


def default_initializer(config: MistralConfig) -> keras.initializers.Initializer:
    """normal(0, initializer_range)."""
    return keras.initializers.RandomNormal(stddev=config.initializer_range)


def _name(dtype: Any) -> str:
    return as_dtype(dtype).name
