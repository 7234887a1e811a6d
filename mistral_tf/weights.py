"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.arguments import check_saving, translated
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.errors import ConfigError
from mistral_core.parameters import BASE_PREFIX, parameters, shapes
from mistral_core.weights import loading, push, saving
from mistral_core.weights.resizing import VOCABULARY, resized_config, resized_rows

from .arrays import as_device, as_policy, from_numpy, to_numpy
from .fit import KerasModel


class PreTrainedModel(KerasModel):
    """A Mistral class: its config, and its way to and from checkpoints."""

    framework = "tf"
    main_input_name = "input_ids"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, name: str | None = None) -> None:
        super().__init__(dtype=as_policy(dtype), name=name)
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    @path_by_either_name
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map). `dtype` may be a policy: parameters then
        come in its variable dtype. A head that the file lacks is initialised from `seed` with one warning. Raises
        CheckpointError, ConfigError or HubError and their kind.
        """
        given = translated(options, dtype=dtype, device=device, attn_implementation=attn_implementation)
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
                initializer=_empty,
            )
            for name, array in loaded.tensors:
                model.set_parameter(name, array)
                del array  # before the next one comes
        model.generation_config = loaded.generation_config
        model.config = model.config.noted(name_or_path=str(path))
        return model

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """Write config, generation config and safetensors in one atomic step, verified before the swap.

        Files of other kinds that are already there stay. `options` are transformers' (safe_serialization=True); what
        they ask for and is not here raises UnsupportedFeatureError. Raises ConversionError and its kind.
        """
        check_saving(options)
        saving.save_pretrained(
            directory,
            self.config,
            self.named_arrays(),
            architecture=self.architecture,
            generation_config=self.generation_config,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        max_shard_size: str | int = "5GB",
    ) -> str:
        """Upload what save_pretrained writes in one commit, and return its address.

        The repository, and the branch `revision`, are made if they are not there. Raises HubError and its kinds.
        """
        return push.save_and_push(
            lambda directory: self.save_pretrained(directory, max_shard_size=max_shard_size),
            repo_id,
            private=private,
            commit_message=commit_message,
            revision=revision,
            token=token,
            create_pr=create_pr,
        )

    def named_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (canonical name, NumPy array) of every tensor of the model, in table order."""
        for name, _ in parameters(self.config, self.architecture):
            yield name, to_numpy(self._parameter(name))

    def set_parameter(self, name: str, array: np.ndarray) -> None:
        """Let the parameter of this canonical name hold an array."""
        self._parameter(name).assign(from_numpy(array))

    def load_arrays(self, arrays: Any) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, self.architecture):
            self.set_parameter(name, np.array(arrays[name]))
        return self

    # What scripts written for transformers call

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from."""
        return self.config.name_or_path

    def num_parameters(self, *, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; tied ones count once."""
        embedding = self.get_input_embeddings().weight
        return sum(
            math.prod(variable.shape)
            for variable in (self.trainable_weights if only_trainable else self.weights)
            if not (exclude_embeddings and variable is embedding)
        )

    def get_input_embeddings(self) -> Any:
        """The embedding of token ids."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding of token ids."""
        self.base_model._replace_layer("embed_tokens", value)

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary; None where the class has none."""
        head = getattr(self, "lm_head", None)
        return self.get_input_embeddings() if head is None and hasattr(self, "lm_head") else head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the projection to the vocabulary."""
        self._replace_layer("lm_head", value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> Any:
        """Give embedding and head rows for another number of tokens: old rows keep their bits, new ones are their mean.

        None keeps the number, to be rounded up to a multiple. Changes `config.vocab_size`; optimizers made before
        hold the old parameters. Raises ConfigError.
        """
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        if config.vocab_size != self.config.vocab_size:
            for name in VOCABULARY & shapes(config, self.architecture).keys():
                rows = resized_rows(to_numpy(self._parameter(name)), config.vocab_size)
                self._owner(name).replace_weight(rows)
            self.config.rebuilt(config)
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make tied tensors one; they always are."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        `tf.recompute_grad`, which does it, has no keywords. Raises ConfigError for any.
        """
        if gradient_checkpointing_kwargs:
            raise ConfigError(f"gradient_checkpointing_kwargs: {sorted(gradient_checkpointing_kwargs)}, none expected.")
        self.base_model.gradient_checkpointing = {}

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = None

    @property
    def base_model(self) -> Any:
        """The MistralModel inside, or itself."""
        return getattr(self, "model", self)

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def config(self) -> AssignableConfig:
        """Sizes and numbers, the model's own view of them; an assignment to a field is checked."""
        return self.base_model._config

    @config.setter
    def config(self, config: MistralConfig) -> None:
        config = MistralConfig.taken(config)
        if hasattr(self.base_model, "_config"):
            self.config.become(config)
        else:
            self.base_model._config = AssignableConfig.showing(config, is_built=True)

    @property
    def device(self) -> str:
        """Where the parameters are."""
        return tf.convert_to_tensor(self.base_model.norm.weight).device

    def _parameter(self, name: str) -> keras.Variable:
        return self._owner(name).weight if name.endswith(".weight") else self._owner(name).bias

    def _owner(self, name: str) -> Any:
        """The layer of a parameter; the bare model's own names lack the `model.` in front."""
        path = name.removeprefix(BASE_PREFIX) if self.architecture == "MistralModel" else name
        return functools.reduce(_child, path.split(".")[:-1], self)

    def _replace_layer(self, name: str, value: Any) -> None:
        self._tracker.untrack(getattr(self, name))  # which an assignment alone does not
        setattr(self, name, value)


def _child(node: Any, key: str) -> Any:
    if key.isdecimal():
        return node[int(key)]
    return getattr(node, "decoder_layers" if key == "layers" else key)


def default_initializer(config: MistralConfig) -> keras.initializers.Initializer:
    """normal(0, initializer_range)."""
    return keras.initializers.RandomNormal(stddev=config.initializer_range)


def _empty(shape: Any, dtype: Any) -> Any:
    """Memory that nobody has touched yet: it costs nothing until a checkpoint's own takes its place."""
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
