"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.arguments import from_transformers
from mistral_core.compat.clients import path_by_either_name
from mistral_core.config import AssignableConfig
from mistral_core.devices import placement
from mistral_core.errors import ConfigError
from mistral_core.lora.loading import with_adapters
from mistral_core.parameters import BASE_PREFIX
from mistral_core.quantization.models import round_activations
from mistral_core.weights import loading
from mistral_core.weights.mixin import Saved

from .arrays import as_device, as_dtype, from_numpy, to_numpy
from .processes import Processes
from .products import dequantised
from .quantize import put
from .sharding import Placement, Rules, shard

# In a graph a view is its value: compiled functions are found by it, and an assignment reaches no graph already made.
with contextlib.suppress(ValueError):  # another copy of this package has told JAX already
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


F = TypeVar("F", bound=Callable[..., Any])

OWN = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
"""The parameters of a model itself: those of adapters beside them are of Flax' own kind."""


class PreTrainedModel(Saved, nnx.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    framework = "flax"
    main_input_name = "input_ids"

    def __init__(self, config: MistralConfig) -> None:
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
        param_dtype: Any = None,
        device: Any = None,
        attn_implementation: str | None = None,
        quantization: Any = None,
        mesh: jax.sharding.Mesh | None = None,
        rules: Rules | None = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map). `dtype` is computed in, `param_dtype`
        (None: the same) is what parameters are kept in; `device` may be a Sharding, or a function of a parameter's
        name; of a sharded one each device reads its part. `mesh` and `rules` are those of `sharding.shard`.
        `quantization` packs each matrix as it comes (`Quantization`, int8, int4, nf4, a config of transformers); a
        packed checkpoint stays packed, or becomes floats with "dequantize". A head that the file lacks is initialised
        from `seed` with one warning. The directory of an adapter is taken too: its base, `base` or the directory that
        it names, with the adapter in it. Raises CheckpointError, ConfigError or HubError and their kind.
        """
        given = from_transformers(
            options, dtype=dtype, device=device, attn_implementation=attn_implementation, quantization=quantization
        )
        dtype, place = given.pop("dtype"), placement(given.pop("device"), as_device)
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
        if mesh is not None:
            placement_of = Placement.of(loaded.config, mesh, rules)
            place = functools.partial(placement_of.parameter, architecture=cls.architecture)
        for weight in loaded.weights:
            matrix = weight.matrix()
            if matrix is None:
                model._set(weight.name, _placed(weight, place(weight.name)))
            else:
                put(model, weight.name, matrix, device=place(weight.name))
        round_activations(model, loaded.activations)
        if mesh is not None:
            shard(model, mesh, rules)
        model.generation_config = loaded.generation_config
        model.config = model.config.noted(name_or_path=str(path))
        return model

    def _with_adapter(self, path: str | os.PathLike[str]) -> Self:
        from .lora import load_adapter

        return load_adapter(self, path)

    def set_parameter(self, name: str, array: np.ndarray, *, device: Any = None) -> None:
        """Let the parameter of this canonical name hold an array.

        Raises UnsupportedFeatureError where it is packed.
        """
        self._refuse_floats(name)
        self._set(name, jax.device_put(from_numpy(array), device))

    def _set(self, name: str, value: Array) -> None:
        parameter, layer = self._parameter(name)
        parameter.set_value(value if layer is None else parameter[...].at[layer].set(value))

    def _module(self, name: str) -> nnx.Module:
        part, layer = self._part(name)
        if layer is None:
            return part
        graph, state = nnx.split(part)  # of stacked layers, a view of one
        return nnx.merge(graph, jax.tree.map(lambda array: array[layer], state))

    def _is_packed(self, name: str) -> bool:
        return hasattr(type(self._part(name)[0]), "matrix")

    def _array(self, name: str) -> np.ndarray:
        if self._is_packed(name):
            return to_numpy(dequantised(self._module(name).packed, self.param_dtype))
        parameter, layer = self._parameter(name)
        return to_numpy(parameter[...] if layer is None else parameter[layer])

    def _processes(self) -> Processes | None:
        return Processes.of(self.get_input_embeddings().weight.get_raw_value())

    def _resize(self, name: str, rows: np.ndarray) -> None:
        self.set_parameter(name, rows, device=self.device)

    def _parameters_of(self, only_trainable: bool) -> list[nnx.Param]:
        found = [node for _, node in nnx.iter_graph(self) if isinstance(node, nnx.Param)]
        adapters = [node for node in found if isinstance(node, nnx.LoRAParam)]
        return adapters if only_trainable and adapters else found

    def _replace_part(self, owner: Any, name: str, part: Any) -> None:
        setattr(owner, name, nnx.data(part))  # also where a tied model had none

    def _keep_config(self, config: AssignableConfig) -> None:
        self.base_model._config = nnx.data(config)

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from."""
        return self.config.name_or_path

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        The keywords are `policy` and `prevent_cse` of `jax.checkpoint`; without any, a CPU has a way of its own, which
        saves more there and has no derivative that goes forward first. Raises ConfigError for another.
        """
        options = gradient_checkpointing_kwargs or {}
        if not options.keys() <= {"policy", "prevent_cse"}:
            raise ConfigError(
                "gradient_checkpointing_kwargs must be policy and prevent_cse, as jax.checkpoint takes them, got "
                f"{sorted(options)}."
            )
        self.base_model.gradient_checkpointing = tuple(options.items())

    # Functional use

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as a plain pytree: canonical (Hugging Face) name -> array, for `model(ids, params=params)`."""
        state = nnx.to_flat_state(nnx.state(self, OWN))
        return {self._canonical(path): parameter.get_value() for path, parameter in state}

    def bind(self, params: dict[str, Array]) -> Self:
        """The same model over other parameters, traced ones too; raises KeyError for a name that is missing.

        Packed matrices and adapters stay as they are.
        """
        graph, state, others = nnx.split(self, OWN, ...)
        replaced = [(path, leaf.replace(params[self._canonical(path)])) for path, leaf in nnx.to_flat_state(state)]
        return nnx.merge(graph, nnx.from_flat_state(replaced), others)

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
        part, layer = self._part(name)
        return getattr(part, name.rpartition(".")[2]), layer

    def _part(self, name: str) -> tuple[Any, int | None]:
        """What holds the last part of a canonical name, and which layer of it where they are stacked (scan.py)."""
        path = self._own_name(name).split(".")[:-1]
        layer = None
        if "layers" in path and not isinstance(self.base_model.layers, nnx.Dict):
            layer = int(path.pop(path.index("layers") + 1))
        return functools.reduce(_child, path, self), layer

    def _canonical(self, path: tuple[Any, ...]) -> str:
        prefix = BASE_PREFIX if self.architecture == "MistralModel" else ""
        return prefix + ".".join(path)


def _child(node: Any, key: str) -> Any:
    return node[key] if isinstance(node, nnx.Dict) else getattr(node, key)


def functional(call: F) -> F:
    """Give a model's call the argument `params`: None means the model's own."""

    @functools.wraps(call)
    def with_params(self: Any, *args: Any, params: dict[str, Array] | None = None, **options: Any) -> Any:
        return call(self if params is None else self.bind(params), *args, **options)

    return cast(F, with_params)


def _placed(weight: loading.Weight, device: Any) -> Array:
    """A tensor where it goes; of a Sharding, each device asks for its own part of it."""
    if not isinstance(device, jax.sharding.Sharding):
        return jax.device_put(from_numpy(weight.read()), device)
    parts = _parts(weight, device.addressable_devices_indices_map(weight.shape).values())
    return jax.make_array_from_callback(weight.shape, device, lambda index: parts[_bounds(index)])


def _parts(weight: loading.Weight, indices: Iterable[tuple[slice, ...]]) -> dict[Any, np.ndarray]:
    """What this process' devices have of a tensor, each part once, and rows that several parts share read once."""
    alike: dict[Any, dict[Any, tuple[slice, ...]]] = {}
    for index in indices:
        alike.setdefault(_bounds(index[:1]), {})[_bounds(index)] = index
    parts = {}
    for wanted in alike.values():
        is_shared, (first, *_) = len(wanted) > 1, wanted.values()
        rows = weight.read(first[:1] if is_shared else first)
        for key, (_, *others) in wanted.items():
            part = rows[(slice(None), *others)] if is_shared else rows
            parts[key] = np.ascontiguousarray(part)  # a view would keep all that was read
    return parts


def _bounds(index: tuple[slice, ...]) -> Any:
    return tuple((each.start, each.stop) for each in index)


def _name(dtype: Any) -> str:
    return jnp.dtype(as_dtype(dtype)).name
