"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import copy
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
from mistral_core.compat.arguments import check_saving, translated
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.errors import ConfigError
from mistral_core.parameters import BASE_PREFIX, HEADS, parameters, shapes
from mistral_core.weights import loading, push, saving
from mistral_core.weights.resizing import VOCABULARY, resized_config, resized_rows

from .arrays import as_device, as_dtype, from_numpy, to_numpy

# In a graph a view is its value: compiled functions are found by it, and an assignment reaches no graph already made.
jax.tree_util.register_pytree_node(
    AssignableConfig,
    lambda config: ((), config.value),
    lambda value, _: AssignableConfig.showing(value, is_built=True),
)


def as_program(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same parts whose graph is equal where compiled programs are: settings of other kinds are gone."""
    shell = copy.copy(model)
    if shell.base_model is not shell:
        shell.model = copy.copy(shell.model)
    shell.generation_config = None
    shell.base_model._config = nnx.data(AssignableConfig.showing(model.config.program(model.architecture)))
    return shell


class PreTrainedModel(nnx.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    framework = "flax"
    main_input_name = "input_ids"
    architecture: str
    """The name of the Mistral class that this one is, or extends."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__name__ in HEADS:
            cls.architecture = cls.__name__

    def __init__(self, config: MistralConfig) -> None:
        self.generation_config = GenerationConfig.from_model_config(config)

    @classmethod
    @path_by_either_name
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        param_dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map). `dtype` is computed in, `param_dtype`
        (None: the same) is what parameters are kept in; `device` may be a Sharding. A head that the file lacks is
        initialised from `seed` with one warning. Raises CheckpointError, ConfigError or HubError and their kind.
        """
        given = translated(options, dtype=dtype, device=device, attn_implementation=attn_implementation)
        dtype, device = given.pop("dtype"), as_device(given.pop("device"))
        attn_implementation = given.pop("attn_implementation")
        kept = dtype if param_dtype is None else param_dtype
        loaded = loading.load_pretrained(
            path,
            cls.architecture,
            config=config,
            dtype=None if kept is None else _name(kept),
            seed=seed,
            verify=verify,
            **given,
        )
        dtype, kept = dtype or kept or loaded.config.dtype, kept or loaded.config.dtype
        # shapes only: nothing is allocated before the file's own tensors
        model = nnx.eval_shape(
            lambda: cls(loaded.config, attn_implementation=attn_implementation, dtype=dtype, param_dtype=kept)
        )
        for name, array in loaded.tensors:
            model.set_parameter(name, array, device=device)
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
            parameter, layer = self._parameter(name)
            yield name, to_numpy(parameter[...] if layer is None else parameter[layer])

    def set_parameter(self, name: str, array: np.ndarray, *, device: Any = None) -> None:
        """Let the parameter of this canonical name hold an array."""
        parameter, layer = self._parameter(name)
        value = jax.device_put(from_numpy(array), device)
        parameter.set_value(value if layer is None else parameter[...].at[layer].set(value))

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
        count = sum(array.size for array in jax.tree.leaves(nnx.state(self, nnx.Param)))
        return count - (self.get_input_embeddings().weight.size if exclude_embeddings else 0)

    def get_input_embeddings(self) -> Any:
        """The embedding of token ids."""
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the embedding of token ids."""
        self.base_model.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        """The projection to the vocabulary; None where the class has none."""
        head = getattr(self, "lm_head", None)
        return self.get_input_embeddings() if head is None and hasattr(self, "lm_head") else head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the projection to the vocabulary."""
        self.lm_head = nnx.data(value)  # also where a tied model had none

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> Any:
        """Give embedding and head rows for another number of tokens: old rows keep their bits, new ones are their mean.

        None keeps the number, to be rounded up to a multiple. Changes `config.vocab_size`; optimizers made before
        hold the old parameters. Raises ConfigError.
        """
        config = resized_config(self.config, new_num_tokens, pad_to_multiple_of)
        if config.vocab_size != self.config.vocab_size:
            for name in VOCABULARY & shapes(config, self.architecture).keys():
                rows = to_numpy(self._parameter(name)[0][...])
                self.set_parameter(name, resized_rows(rows, config.vocab_size), device=self.device)
            self.config.rebuilt(config)
        return self.get_input_embeddings()

    def tie_weights(self) -> None:
        """Make tied tensors one; they always are."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        The keywords are `policy` and `prevent_cse` of `jax.checkpoint`. Raises ConfigError for another.
        """
        options = gradient_checkpointing_kwargs or {}
        if not options.keys() <= {"policy", "prevent_cse"}:
            raise ConfigError(
                f"gradient_checkpointing_kwargs: {sorted(options)}, policy and prevent_cse were expected, as "
                "jax.checkpoint takes them."
            )
        self.base_model.gradient_checkpointing = tuple(options.items())

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.base_model.gradient_checkpointing = None

    @property
    def base_model(self) -> Any:
        """The MistralModel inside, or itself."""
        return getattr(self, "model", self)

    # Functional use

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as a plain pytree: canonical (Hugging Face) name -> array, for `model(ids, params=params)`."""
        state = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {self._canonical(path): parameter.get_value() for path, parameter in state}

    def bind(self, params: dict[str, Array]) -> Self:
        """The same model over other parameters, traced ones too; raises KeyError for a name that is missing."""
        graph, state = nnx.split(self)
        replaced = [(path, leaf.replace(params[self._canonical(path)])) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(replaced))

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output as asked for: by name, or as a plain tuple without the Nones."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @property
    def config(self) -> AssignableConfig:
        """Sizes and numbers, the model's own view of them; an assignment to a field is checked.

        A transform such as nnx.jit leaves another, equal one: ask the model for it each time.
        """
        return self.base_model._config

    @config.setter
    def config(self, config: MistralConfig) -> None:
        config = MistralConfig.taken(config)
        if hasattr(self.base_model, "_config"):
            self.config.become(config)
        else:
            self.base_model._config = nnx.data(AssignableConfig.showing(config, is_built=True))

    @property
    def device(self) -> Any:
        """Where the parameters are: a JAX device, or a Sharding over several."""
        return self.get_input_embeddings().weight[...].device

    @property
    def dtype(self) -> Any:
        """The dtype of the computation."""
        return jnp.dtype(self.get_input_embeddings().dtype)

    @property
    def param_dtype(self) -> Any:
        """The dtype of the parameters."""
        return self.get_input_embeddings().weight.dtype

    def _parameter(self, name: str) -> tuple[nnx.Param, int | None]:
        """The parameter of a canonical name, and which layer of it where they are stacked (scan.py)."""
        # the bare model's own names lack the `model.` in front
        path = (name.removeprefix(BASE_PREFIX) if self.architecture == "MistralModel" else name).split(".")
        layer = None
        if "layers" in path and not isinstance(self.base_model.layers, nnx.Dict):
            layer = int(path.pop(path.index("layers") + 1))
        return functools.reduce(_child, path, self), layer

    def _canonical(self, path: tuple[Any, ...]) -> str:
        prefix = BASE_PREFIX if self.architecture == "MistralModel" else ""
        return prefix + ".".join(path)


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
