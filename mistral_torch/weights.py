"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.arguments import check_saving, translated
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.errors import MissingTensorsError
from mistral_core.parameters import BASE_PREFIX, HEADS, parameters, shapes
from mistral_core.weights import loading, push, saving
from mistral_core.weights.resizing import VOCABULARY, resized_config, resized_rows

from .arrays import as_device, as_dtype, from_numpy, to_numpy
from .compat import AsTransformers, any_parameter, execution_device, kept_parameter


class PreTrainedModel(AsTransformers, nn.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    architecture: str
    """The name of the Mistral class that this one is, or extends."""

    def __init_subclass__(cls, **options: Any) -> None:
        if cls.__name__ in HEADS:
            cls.architecture = cls.__name__

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.generation_config = GenerationConfig.from_model_config(config)
        self.name_or_path = ""
        self.register_load_state_dict_post_hook(_tie)

    @classmethod
    @path_by_either_name
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: torch.device | str | int | None = None,
        attn_implementation: str | None = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map, use_flash_attention_2). A head that the
        file lacks is initialised from `seed` with one warning. Raises CheckpointError, ConfigError or HubError and
        their kind.
        """
        given = translated(options, dtype=dtype, device=device, attn_implementation=attn_implementation)
        dtype, device = given.pop("dtype"), as_device(given.pop("device"))
        attn_implementation = given.pop("attn_implementation")
        loaded = loading.load_pretrained(
            path,
            cls.architecture,
            config=config,
            dtype=None if dtype is None else _name(dtype),
            seed=seed,
            verify=verify,
            **given,
        )
        with torch.device("meta"):
            model = cls(loaded.config, attn_implementation=attn_implementation)
        for name, array in loaded.tensors:
            model.set_parameter(name, array, device=device)
            del array  # before the next one comes
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.name_or_path = str(path)
        model.config = model.config.noted(name_or_path=model.name_or_path)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """Write config, generation config and safetensors in one atomic step, verified before the swap.

        Files of other kinds that are already there stay. `options` are transformers': `state_dict` (its tensors in
        place of the model's), `is_main_process` (False writes nothing), `save_function` (ours writes); what they ask
        for and is not here raises UnsupportedFeatureError. Raises ConversionError and its kind.
        """
        state = options.pop("state_dict", None)
        is_writer = options.pop("is_main_process", True)
        options.pop("save_function", None)
        check_saving(options)
        if not is_writer:
            return
        saving.save_pretrained(
            directory,
            self.config,
            self.named_arrays() if state is None else self._arrays_of(state),
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
            yield name, to_numpy(kept_parameter(self, self._own_name(name)))

    def _arrays_of(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
        """What `named_arrays` yields, from a state dict; raises MissingTensorsError."""
        names = [name for name, _ in parameters(self.config, self.architecture)]
        missing = [name for name in names if self._own_name(name) not in state]
        if missing:
            raise MissingTensorsError(
                f"state_dict: {len(missing)} tensors are missing, {missing[0]!r} among them; give what "
                "model.state_dict() returns, or leave it out."
            )
        return ((name, to_numpy(state[self._own_name(name)])) for name in names)

    def set_parameter(self, name: str, array: np.ndarray, *, device: torch.device | str | None = None) -> None:
        """Let the parameter of this canonical name hold an array."""
        module_name, _, attribute = self._own_name(name).rpartition(".")
        module = self.get_submodule(module_name)
        trained = getattr(module, attribute).requires_grad
        setattr(module, attribute, nn.Parameter(from_numpy(array).to(device), requires_grad=trained))

    def load_arrays(self, arrays: Any) -> Self:
        """Set every parameter from a mapping of canonical names to NumPy arrays."""
        for name, _ in parameters(self.config, self.architecture):
            self.set_parameter(name, np.array(arrays[name]), device=self.device)
        self.tie_weights()
        return self

    # What scripts written for transformers call

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return hasattr(cls, "generate")

    def num_parameters(self, *, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; tied ones count once."""
        embedding = self.get_input_embeddings().weight
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and parameter is embedding)
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of token ids."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of token ids."""
        self.base_model.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary; None where the class has none."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the projection to the vocabulary."""
        self.lm_head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None
    ) -> nn.Embedding:
        """Give embedding and head rows for another number of tokens: old rows keep their bits, new ones are their mean.

        None keeps the number, to be rounded up to a multiple. Changes `config.vocab_size`; optimizers made before
        hold the old parameters. Raises ConfigError.
        """
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        if config.vocab_size != self.config.vocab_size:
            for name in VOCABULARY & shapes(config, self.architecture).keys():
                rows = to_numpy(self.get_parameter(self._own_name(name)))
                self.set_parameter(name, resized_rows(rows, config.vocab_size), device=self.device)
            self.get_input_embeddings().num_embeddings = config.vocab_size
            if self.get_output_embeddings() is not None:
                self.get_output_embeddings().out_features = config.vocab_size
            self.config.rebuilt(config)
            self.tie_weights()
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make tied tensors one; only a language model has any."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        The keywords are those of `torch.utils.checkpoint.checkpoint`.
        """
        self.base_model.gradient_checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = None

    @property
    def base_model(self) -> nn.Module:
        """The MistralModel inside, or itself."""
        return getattr(self, "model", self)

    def initialise(self, prefix: str = "") -> None:
        """Fresh values for the parameters under a prefix: norms 1, biases 0, else normal(0, initializer_range)."""
        for name, parameter in self.named_parameters():
            if not name.startswith(prefix) or parameter.is_meta:  # on which torch imports much to do nothing
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
    def device(self) -> torch.device:
        """Where the parameters are, or, while accelerate keeps them elsewhere, where it computes with them."""
        device = any_parameter(self).device
        return execution_device(self) or device if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return any_parameter(self).dtype

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """torch's way to move and cast; from and to the meta device it makes two parameters of a tied one."""
        super()._apply(*arguments, **options)
        self.tie_weights()
        return self

    def _own_name(self, name: str) -> str:
        """The bare model's own names lack the `model.` in front."""
        return name.removeprefix(BASE_PREFIX) if self.architecture == "MistralModel" else name


def _tie(module: PreTrainedModel, keys: Any) -> None:
    """After `load_state_dict`: a tied tensor that a file leaves out is not missing."""
    module.tie_weights()
    for tied, source in module._tied_weights_keys.items():
        if tied in keys.missing_keys and source not in keys.missing_keys:
            keys.missing_keys.remove(tied)


def _name(dtype: Any) -> str:
    return str(as_dtype(dtype)).removeprefix("torch.")
