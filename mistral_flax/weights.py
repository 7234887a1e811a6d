"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.parameters import BASE_PREFIX, parameters
from mistral_core.weights import pretrained

from .arrays import as_dtype, from_numpy, to_numpy


class PreTrainedModel(nnx.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    def __init__(self, config: MistralConfig) -> None:
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: jax.Device | None = None,
        attn_implementation: str = "dot_product",
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
        # shapes only: nothing is allocated before the file's own tensors
        model = nnx.eval_shape(lambda: cls(loaded.config, attn_implementation=attn_implementation))
        for name, array in loaded.tensors:
            model.set_parameter(name, array, device=device)
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
            yield name, to_numpy(self._parameter(name)[...])

    def set_parameter(self, name: str, array: np.ndarray, *, device: jax.Device | None = None) -> None:
        """Let the parameter of this canonical name hold an array."""
        self._parameter(name).set_value(jax.device_put(from_numpy(array), device))

    def load_arrays(self, arrays: Any) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, type(self).__name__):
            self.set_parameter(name, np.array(arrays[name]))
        return self

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as a plain pytree: canonical (Hugging Face) name -> array, for `model(ids, params=params)`."""
        return {name: self._parameter(name)[...] for name, _ in parameters(self.config, type(self).__name__)}

    def bind(self, params: dict[str, Array]) -> Self:
        """The same model over other parameters, traced ones too; raises KeyError for a name that is missing."""
        graph, state = nnx.split(self)
        prefix = BASE_PREFIX if type(self).__name__ == "MistralModel" else ""
        replaced = [(path, leaf.replace(params[prefix + ".".join(path)])) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(replaced))

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters."""
        return jax.tree.leaves(nnx.state(self, nnx.Param))[0].dtype

    def _parameter(self, name: str) -> nnx.Param:
        """The bare model's own names lack the `model.` in front."""
        path = name.removeprefix(BASE_PREFIX) if type(self).__name__ == "MistralModel" else name
        return functools.reduce(_child, path.split("."), self)


def _child(node: Any, key: str) -> Any:
    return node[key] if isinstance(node, nnx.Dict) else getattr(node, key)


def functional(call: Callable[..., Any]) -> Callable[..., Any]:
    """Give a model's call the argument `params`: None means the model's own."""

    @functools.wraps(call)
    def with_params(self: Any, *args: Any, params: dict[str, Array] | None = None, **options: Any) -> Any:
        return call(self if params is None else self.bind(params), *args, **options)

    return with_params


def _name(dtype: Any) -> str:
    return jnp.dtype(as_dtype(dtype)).name
