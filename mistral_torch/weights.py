"""Parameters <-> the stream of named arrays: what every Mistral class can do with checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from mistral_core import GenerationConfig, MistralConfig
from mistral_core.compat.arguments import from_transformers
from mistral_core.compat.clients import path_by_either_name
from mistral_core.devices import placement
from mistral_core.errors import UnsupportedFeatureError
from mistral_core.lora.loading import with_adapters
from mistral_core.quantization.models import round_activations
from mistral_core.weights import loading
from mistral_core.weights.mixin import Saved

from .arrays import as_device, as_dtype, from_numpy, to_numpy
from .compat import AsTransformers, any_parameter, execution_device, kept_parameter
from .dispatch import Dispatch
from .processes import Together, device_of, index_of, is_cut, is_fsdp
from .quantize import put

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class PreTrainedModel(AsTransformers, Saved, nn.Module):
    """A Mistral class: its config, and its way to and from checkpoints."""

    placement: Any = None  # a sharding.Placement: transformers looks for names in annotations at run time
    """Which part of a MistralModel this process holds, where `sharding.parallelize` has cut it."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.generation_config = GenerationConfig.from_model_config(config)
        self.name_or_path = ""
        self.register_load_state_dict_post_hook(_tie)

    @classmethod
    @path_by_either_name
    @with_adapters
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: MistralConfig | None = None,
        dtype: Any = None,
        device: torch.device | str | int | Callable[[str], Any] | None = None,
        attn_implementation: str | None = None,
        quantization: Any = None,
        mesh: DeviceMesh | None = None,
        seed: int = 0,
        verify: str = "sizes",
        **options: Any,
    ) -> Self:
        """Load a checkpoint directory or hub id, one tensor at a time; without `dtype`, in the file's own.

        `options` are hub arguments (revision, cache_dir, token, local_files_only), fields of the config to replace,
        and transformers' names of these arguments (torch_dtype, device_map, use_flash_attention_2). `device` may be a
        function of a parameter's name; over a `mesh` of processes, which `sharding.parallelize` takes, each reads its
        part; a device_map of several devices, with max_memory and offload_folder, is accelerate's. `quantization` packs
        each matrix as it comes (`Quantization`, int8, int4, nf4, a config of transformers); a packed checkpoint stays
        packed, or becomes floats with "dequantize". A head that the file lacks is initialised from `seed` with one
        warning. The directory of an adapter is taken too: its base, `base` or the directory that it names, with the
        adapter in it. Raises CheckpointError, ConfigError or HubError and their kind.
        """
        dispatch = Dispatch.asked(options)
        given = from_transformers(
            options, dtype=dtype, device=device, attn_implementation=attn_implementation, quantization=quantization
        )
        dtype, place = given.pop("dtype"), placement(given.pop("device"), as_device)
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

        def hold(weight: loading.Weight) -> None:
            model.set_parameter(weight.name, weight.read(), device=place(weight.name))

        dispatched = None
        if mesh is not None:
            place, hold = _cut(model.to(as_dtype(loaded.config.dtype)), mesh)
        elif dispatch is not None:
            dispatched = dispatch.of(model, loaded.config.dtype)
            place, hold = dispatched.place, dispatched.hold
        for weight in loaded.weights:
            matrix = weight.matrix()
            if matrix is None:
                hold(weight)
            else:
                put(model, weight.name, matrix, device=place(weight.name))
        round_activations(model, loaded.activations)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.name_or_path = str(path)
        model.config = model.config.noted(name_or_path=model.name_or_path)
        if dispatched is not None:
            dispatched.finished()
        return model.eval()

    def _with_adapter(self, path: str | os.PathLike[str]) -> Self:
        from .lora import load_adapter

        return load_adapter(self, path)

    def set_parameter(self, name: str, array: np.ndarray, *, device: torch.device | str | None = None) -> None:
        """Let the parameter of this canonical name hold an array.

        It stays where it was, unless a device is given; of one that is cut over processes, each takes its part. Raises
        UnsupportedFeatureError where it is packed.
        """
        self._refuse_floats(name)
        self._reshard(name)
        module, attribute = self._module(name), name.rpartition(".")[2]
        old = getattr(module, attribute)
        if is_cut(old):
            self._set_part(name, array.__getitem__)
            return
        if device is None and not old.is_meta:
            device = old.device
        setattr(module, attribute, nn.Parameter(from_numpy(array).to(device), requires_grad=old.requires_grad))

    @torch.no_grad()
    def _set_part(self, name: str, read: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
        """Let this process's part of a parameter hold what is read at its index."""
        parameter = getattr(self._module(name), name.rpartition(".")[2])
        here = parameter.to_local()
        if here.numel():
            here.copy_(from_numpy(np.ascontiguousarray(read(index_of(parameter)))))

    def _module(self, name: str) -> nn.Module:
        return self.get_submodule(self._own_name(name).rpartition(".")[0])

    def _reshard(self, name: str) -> None:
        """Let FSDP2 drop the copy of a parameter that it may have gathered for a call: what counts is cut again."""
        module: nn.Module = self
        for step in ("", *self._own_name(name).split(".")[:-1]):
            module = getattr(module, step) if step else module
            if is_fsdp(module):
                module.reshard()

    def _array(self, name: str) -> np.ndarray:
        self._reshard(name)
        array = kept_parameter(self, self._own_name(name))
        return to_numpy(array.to(self.dtype) if self._is_packed(name) else array)

    def _resize(self, name: str, rows: np.ndarray) -> None:
        if self._together() is not None:
            raise UnsupportedFeatureError("resize_token_embeddings: resize the model before it is cut over processes.")
        self.set_parameter(name, rows)
        self.get_input_embeddings().num_embeddings = len(rows)
        if self.get_output_embeddings() is not None:
            self.get_output_embeddings().out_features = len(rows)

    def _together(self) -> Together | None:
        """The processes that hold parts of the model; None where this one holds all of it."""
        return Together.of(self)

    _processes = _together

    @property
    def config_here(self) -> MistralConfig:
        """The config of the part of the model that this process holds: fewer heads where they are cut."""
        placement = self.base_model.placement
        return self.config if placement is None else placement.config_here

    def _parameters_of(self, only_trainable: bool) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad or not only_trainable)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only each layer's input and compute the layer again for its gradients.

        The keywords are those of `torch.utils.checkpoint.checkpoint`.
        """
        self.base_model.gradient_checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

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


def _tie(module: PreTrainedModel, keys: Any) -> None:
    """After `load_state_dict`: a tied tensor that a file leaves out is not missing."""
    module.tie_weights()
    for tied, source in module._tied_weights_keys.items():
        if tied in keys.missing_keys and source not in keys.missing_keys:
            keys.missing_keys.remove(tied)


def _cut(
    model: PreTrainedModel, mesh: DeviceMesh
) -> tuple[Callable[[str], torch.device], Callable[[loading.Weight], None]]:
    """Cut a model over a mesh, and give its parts memory; where what is packed goes, and what reads the others."""
    from .sharding import parallelize  # which loads torch.distributed

    device = device_of(mesh)
    parallelize(model, mesh).to_empty(device=device)
    return lambda name: device, lambda weight: model._set_part(weight.name, weight.read)


def _name(dtype: Any) -> str:
    return str(as_dtype(dtype)).removeprefix("torch.")
