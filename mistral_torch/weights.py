"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.parameters import BASE_PREFIX, parameters
from mistral_core.weights import pretrained

from .arrays import as_dtype, from_numpy, to_numpy


class PreTrainedModel(nn.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: torch.device | str | None = None,
        attn_implementation: str = "sdpa",
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
        with torch.device("meta"):
            model = cls(loaded.config, attn_implementation=attn_implementation)
        for name, array in loaded.tensors:
            model.set_parameter(name, array, device=device)
            del array  # before the next one comes
        model.tie_weights()
        model.generation_config = loaded.generation_config
        return model.eval()

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
            yield name, to_numpy(self.get_parameter(self._own_name(name)))

    def set_parameter(self, name: str, array: np.ndarray, *, device: torch.device | str | None = None) -> None:
        """Let the parameter of this canonical name hold an array."""
        module_name, _, attribute = self._own_name(name).rpartition(".")
        setattr(self.get_submodule(module_name), attribute, nn.Parameter(from_numpy(array).to(device)))

    def load_arrays(self, arrays: Any) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, type(self).__name__):
            self.set_parameter(name, np.array(arrays[name]), device=self.device)
        self.tie_weights()
        return self

    def tie_weights(self) -> None:
        """Make tied tensors one; only a language model has any."""

    def initialise(self, prefix: str = "") -> None:
        """Fresh values for the parameters under a prefix: norms 1, biases 0, else normal(0, initializer_range)."""
        for name, parameter in self.named_parameters():
            if not name.startswith(prefix):
                continue
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    def _own_name(self, name: str) -> str:
        """The bare model's own names lack the `model.` in front."""
        return name.removeprefix(BASE_PREFIX) if type(self).__name__ == "MistralModel" else name


def _name(dtype: Any) -> str:
    return str(as_dtype(dtype)).removeprefix("torch.")
