"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import functools
import os
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.arguments import from_transformers
from mistral_core.compat.clients import path_by_either_name
from mistral_core.errors import ConfigError
from mistral_core.lora.loading import with_adapters
from mistral_core.quantization.models import round_activations
from mistral_core.weights import loading
from mistral_core.weights.mixin import Saved
from mistral_core.weights.processes import Processes

from .arrays import as_device, as_policy, from_numpy, to_numpy
from .fit import KerasModel
from .quantize import put
from .saving import empty
from .strategies import Workers
from .traces import refuse_distribution


class PreTrainedModel(Saved, KerasModel):
    """A Mistral class: its config, and its way to and from checkpoints."""

    framework = "tf"
    main_input_name = "input_ids"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, name: str | None = None) -> None:
        super().__init__(dtype=as_policy(dtype), name=name)
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    @path_by_either_name
    @with_adapters
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        quantization: Any = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map). `dtype` may be a policy: parameters then
        come in its variable dtype. `quantization` packs each matrix as it comes (`Quantization`, int8, int4, nf4, a
        config of transformers); a packed checkpoint stays packed, or becomes floats with "dequantize". A head that the
        file lacks is initialised from `seed` with one warning. The directory of an adapter is taken too: its base,
        `base` or the directory that it names, with the adapter in it. Raises CheckpointError, ConfigError or HubError
        and their kind.
        """
        refuse_distribution()
        given = from_transformers(
            options, dtype=dtype, device=device, attn_implementation=attn_implementation, quantization=quantization
        )
        dtype, device = given.pop("dtype"), as_device(given.pop("device"))
        attn_implementation = given.pop("attn_implementation")
        policy = None if dtype is None else as_policy(dtype)
        loaded = loading.load_pretrained(
            path,
            cls.architecture,
            config=config,
            dtype=None if policy is None else policy.variable_dtype,
            seed=seed,
            verify=verify,
            **given,
        )
        with tf.device(device):
            model = cls(
                loaded.config,
                attn_implementation=attn_implementation,
                dtype=policy or loaded.config.dtype or "float32",
                initializer=empty,
            )
            for weight in loaded.weights:
                matrix = weight.matrix()
                if matrix is None:
                    model.set_parameter(weight.name, weight.read())
                else:
                    put(model, weight.name, matrix)
        round_activations(model, loaded.activations)
        model.generation_config = loaded.generation_config
        model.config = model.config.noted(name_or_path=str(path))
        return model

    def _with_adapter(self, path: str | os.PathLike[str]) -> Self:
        from .lora import load_adapter

        return load_adapter(self, path)

    def set_parameter(self, name: str, array: np.ndarray) -> None:
        """Let the parameter of this canonical name hold an array.

        Raises UnsupportedFeatureError where it is packed.
        """
        self._refuse_floats(name)
        self._parameter(name).assign(from_numpy(array))

    def _module(self, name: str) -> Any:
        return self._part(name, 1)

    def _owner(self, name: str) -> Any:
        """The part of the model that has the module of a parameter."""
        return self._part(name, 2)

    def _part(self, name: str, above: int) -> Any:
        return functools.reduce(_child, self._own_name(name).split(".")[:-above], self)

    def _array(self, name: str) -> np.ndarray:
        parameter = self._parameter(name)
        return to_numpy(tf.cast(parameter, self.variable_dtype) if self._is_packed(name) else parameter)

    def _resize(self, name: str, rows: np.ndarray) -> None:
        self._refuse_floats(name)
        with self.distribute_strategy.scope():
            self._module(name).replace_weight(rows)

    def _parameters_of(self, only_trainable: bool) -> list[keras.Variable]:
        if only_trainable:
            return self.trainable_weights
        packed = {id(weight) for _, part in self.packed_parts() for weight in part.weights}
        return [weight for weight in self.weights if id(weight) not in packed]

    def _processes(self) -> Processes | None:
        return Workers.of(self)

    def _replace_part(self, owner: Any, name: str, part: Any) -> None:
        owner._tracker.untrack(getattr(owner, name))  # which an assignment alone does not
        setattr(owner, name, part)

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from."""
        return self.config.name_or_path

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        `tf.recompute_grad`, which does it, has no keywords. Raises ConfigError for any.
        """
        if gradient_checkpointing_kwargs:
            raise ConfigError(
                f"gradient_checkpointing_kwargs must be none, got {sorted(gradient_checkpointing_kwargs)}."
            )
        self.base_model.gradient_checkpointing = {}

    @property
    def device(self) -> str:
        """Where the parameters are."""
        return tf.convert_to_tensor(self.base_model.norm.weight).device

    def _parameter(self, name: str) -> Any:
        module = self._module(name)
        return module.weight if name.endswith(".weight") else module.bias


def _child(node: Any, key: str) -> Any:
    if key.isdecimal():
        return node[int(key)]
    return getattr(node, "decoder_layers" if key == "layers" else key)


def default_initializer(config: MistralConfig) -> keras.initializers.Initializer:
    """normal(0, initializer_range)."""
    return keras.initializers.RandomNormal(stddev=config.initializer_range)
