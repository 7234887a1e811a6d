"""What clients of transformers' models ask of a model: names they read, methods they call, the class they look for.

transformers' Trainer and pipelines, accelerate, peft and trl know a model by these; the model itself needs none.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mistral_core.compat.arguments import check_saving
from mistral_core.compat.clients import SeenAs
from mistral_core.errors import InputError, MissingTensorsError, UnsupportedFeatureError
from mistral_core.parameters import BODY, HEADS, parameters
from mistral_core.quantization.matrix import PackedMatrix

from .arrays import to_numpy
from .attention import ALIASES, check_implementation
from .cache import KVCache
from .outputs import Dictionary
from .processes import is_cut


class AsTransformers(SeenAs):
    """The part of a Mistral class that transformers' clients see."""

    seen_as = ("transformers.modeling_utils.PreTrainedModel",)

    # What goes in and comes out
    framework = "pt"
    main_input_name = "input_ids"
    input_modalities = "text"
    output_modalities = ("text",)
    base_model_prefix = "model"
    model_tags: list[str] | None = None
    accepts_loss_kwargs = True  # what the Trainer asks: whether the loss takes num_items_in_batch
    loss_type: str | None = None  # and whether it is of the next token, so that a row's first label does not count

    # What stays on one device, and what hooks that move arguments leave where it is
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    is_parallelizable = model_parallel = False

    # Which numbers there are
    is_quantized = is_loaded_in_8bit = is_loaded_in_4bit = False
    hf_quantizer = quantization_method = None
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = None
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = None

    # What it can do
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = False  # a function of theirs in place of our attention
    _is_stateful = False

    @classmethod
    def is_custom_code(cls) -> bool:
        """That the class is not transformers' own: their renaming of tensors does not concern it."""
        return True

    @property
    def warnings_issued(self) -> dict[str, bool]:
        """Where trainers note which of their warnings were given."""
        return self.__dict__.setdefault("_warnings_issued", {})

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """The head's tensor -> the one it is, where the config ties them."""
        tied = self.get_output_embeddings() is not None and self.config.tie_word_embeddings
        return {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}

    @property
    def _tp_plan(self) -> dict[str, str]:
        """How each matrix is cut among processes, in transformers' words, which has none for embeddings."""
        rows = [row for row in (*BODY, *HEADS[self.architecture]) if row.is_linear and row.axes[0] != "C"]
        return {
            self._own_name(row.name).removesuffix(".weight").replace("{}", "*"): "colwise_gather_output"
            if row.kind == "head"
            else "rowwise"
            if row.axes[0] == "D"
            else "colwise"
            for row in rows
        }

    @property
    def tp_size(self) -> int | None:
        """Among how many processes each layer is cut; None where it is whole."""
        placement = self.base_model.placement
        return None if placement is None or placement.tensor is None else placement.tensor.size()

    _tp_size = tp_size

    @property
    def _device_mesh(self) -> Any:
        """The mesh of processes; None where the model is whole."""
        return None if self.base_model.placement is None else self.base_model.placement.mesh

    @property
    def vocab_size(self) -> int:
        """How many tokens the config has."""
        return self.config.vocab_size

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Tensor -> the one it is."""
        return self._tied_weights_keys

    @property
    def _keys_to_ignore_on_save(self) -> list[str] | None:
        """What a file need not hold."""
        return [*self._tied_weights_keys] or None

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: str | int = "5GB",
        overwrite: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        save_function: Any = None,
        **options: Any,
    ) -> None:
        """Write config, generation config and safetensors in one atomic step, verified before the swap.

        Files of other kinds that are already there stay. The tensors of `state_dict` are written in place of the
        model's; without `is_main_process` nothing is; `save_function` is taken and ours writes. Of a model that is cut
        over processes all call this, and the first one writes. Further options of transformers that ask for what is not
        here raise UnsupportedFeatureError. Raises ConversionError and its kind.
        """
        check_saving(options)
        if state_dict is None:
            tensors, processes = self.named_tensors(), self._processes()
        else:
            tensors = self._tensors_of(state_dict)
            processes = self._processes() if any(map(is_cut, state_dict.values())) else None
        if is_main_process or processes is not None:
            self._write(directory, tensors, max_shard_size, overwrite, processes)

    def _tensors_of(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray | PackedMatrix]]:
        """What `named_tensors` yields, floats from a state dict; raises MissingTensorsError."""
        packed = dict(self.packed_parts())
        names = [name for name, _ in parameters(self.config, self.architecture) if name not in packed]
        missing = [name for name in names if self._own_name(name) not in state]
        if missing:
            raise MissingTensorsError(
                f"state_dict: {len(missing)} tensors are missing, {missing[0]!r} among them; give what "
                "model.state_dict() returns, or leave it out."
            )
        floats = ((name, to_numpy(state[self._own_name(name)])) for name in names)
        return itertools.chain(floats, ((name, part.matrix) for name, part in packed.items()))

    def get_decoder(self) -> nn.Module:
        """The MistralModel inside, or itself."""
        return self.base_model

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the MistralModel inside."""
        self.model = decoder
        self.tie_weights()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters and buffers; tied ones count once."""
        buffers = self.buffers() if return_buffers else ()
        return sum(x.numel() * x.element_size() for x in (*self.parameters(), *buffers))

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Remember tags for those who write model cards; none is written here."""
        self.model_tags = [*(self.model_tags or []), *([tags] if isinstance(tags, str) else tags)]

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` as the Trainer of transformers 5 calls it; every layer, nothing offloaded."""
        if every_n_layers != 1 or offload:
            raise UnsupportedFeatureError(
                f"activation checkpointing: every_n_layers={every_n_layers!r}, offload={offload!r}; every layer is "
                "checkpointed where it computes, leave them out."
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled."""
        return self.base_model.gradient_checkpointing is not None

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Let gradients reach the embeddings' output though they are frozen, as reentrant checkpointing needs."""
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self._require_grads_hook.remove()

    def _replicate_for_data_parallel(self) -> nn.Module:
        """torch's way to the copy of a module for one device of DataParallel, which gathers what the copies return."""
        replica = super()._replicate_for_data_parallel()
        replica._forward_hooks = self._forward_hooks.copy()
        replica.register_forward_hook(_gatherable)
        return replica


def attention_name(implementation: str | None) -> str:
    """An attention implementation by the name that transformers gives it."""
    own = check_implementation(implementation)
    return {ours: theirs for theirs, ours in ALIASES.items()}.get(own, own)


def any_parameter(model: nn.Module) -> Tensor:
    """One of its parameters; the copies that DataParallel makes of a model have them elsewhere."""
    held = next(model.parameters(), None)
    if held is not None:
        return held
    return next(x for module in model.modules() for x in getattr(module, "_former_parameters", {}).values())


def execution_device(model: nn.Module) -> torch.device | None:
    """Where accelerate computes with parameters that it keeps elsewhere; None where it does not."""
    devices = (getattr(hook, "execution_device", None) for module in model.modules() for hook in _hooks(module))
    return next((torch.device(device) for device in devices if device is not None), None)


def kept_parameter(model: nn.Module, name: str) -> Tensor:
    """A parameter by its name, wherever accelerate keeps it; raises InputError where there are no values."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = getattr(module, attribute)
    if not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[attribute]
    raise InputError(f"{name}: it is on the meta device and has no values; load a checkpoint into the model first.")


def _hooks(module: nn.Module) -> list[Any]:
    """What accelerate has put around a module's forward."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _gatherable(module: nn.Module, inputs: Any, output: Any) -> Any:
    """The output of a copy of the model, as torch puts those of all devices together, along the batch."""
    for field in output.values() if isinstance(output, dict) else output:
        if isinstance(field, Tensor | None) or type(field) is tuple:
            continue
        if not isinstance(field, KVCache) or field.capacity is not None:
            kind = "a KVCache with a capacity" if isinstance(field, KVCache) else f"a {type(field).__name__}"
            raise UnsupportedFeatureError(
                f"past_key_values: {kind}, which DataParallel cannot put together from several devices; give a KVCache "
                "without capacity, or use_cache=False."
            )
    if isinstance(output, Dictionary):
        output._yields_names = True
    return output
