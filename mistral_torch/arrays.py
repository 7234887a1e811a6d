"""Between NumPy and PyTorch, and what a user may pass as a model's input."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mistral_core import MistralConfig, devices, validate
from mistral_core.errors import ConfigError, InputError
from mistral_core.plain import dtype_name

from .cache import KVCache, is_mapped
from .processes import is_cut, joined

if KVCache not in pytree.SUPPORTED_NODES:  # torch.export writes the types of a program's outputs by name
    pytree._register_namedtuple(KVCache, serialized_type_name=f"{KVCache.__module__}.{KVCache.__qualname__}")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def as_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype from itself, its name, or any framework's; raises ConfigError for one no model can have."""
    name = str(dtype_name(dtype))
    if name not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[name]


def as_device(device: Any) -> torch.device | None:
    """A torch device from itself, its name, a number (-1 is the CPU), or "auto": the first GPU if there is one.

    Raises ConfigError for a device that is not here.
    """
    if device is None:
        return None
    found = devices.find(device, _devices(), framework="torch")
    if found.index is None or devices.parse(device).number is not None:
        return found
    return torch.device(found.type, torch.accelerator.current_device_index())  # a process may have chosen its own


def _devices() -> dict[str, list[torch.device]]:
    """What is here, by kind."""
    here = {"cpu": [torch.device("cpu")]}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        found = [torch.device(kind, index) for index in range(torch.accelerator.device_count())]
        here[devices.NAMES.get(kind, kind)] = found
    return here | {devices.NOWHERE: [torch.device("meta")]}


def to_numpy(array: Tensor) -> np.ndarray:
    """A tensor as NumPy, bits kept: bfloat16 travels as its 16 bits; of one cut over processes, which all ask, all."""
    array = (joined(array) if is_cut(array) else array).detach().cpu()
    if array.dtype == torch.bfloat16:
        return array.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


def memory(array: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as NumPy, strides kept: who writes into one writes into the other."""
    if array.dtype == torch.bfloat16:
        return array.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.detach().numpy()


def from_numpy(array: np.ndarray) -> Tensor:
    """A NumPy array as a tensor over the same memory, bits kept; a read-only or strided one is copied."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def is_traced(*arrays: Any) -> bool:
    """Whether there are no values to look at: under torch.compile or torch.func, fake, or on the meta device."""
    if torch.compiler.is_compiling() or is_mapped():
        return True
    return any(a.is_meta or type(a) not in (Tensor, nn.Parameter) for a in arrays if isinstance(a, Tensor))


_NO_CONTEXT = contextlib.nullcontext()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast, where the device of x has it, leaves products as they are."""
    kind = x.device.type
    # asked first, for the context takes longer than a small product
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return _NO_CONTEXT
    return torch.autocast(kind, enabled=False)


class Inputs(NamedTuple):
    """What `MistralModel` computes with, on its device."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    """[B, T] of the new tokens."""
    position_ids: Tensor | None
    document_ids: Tensor | None


def model_inputs(
    config: MistralConfig,
    device: torch.device,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: KVCache | None = None,
    inputs_embeds: Any = None,
    document_ids: Any = None,
) -> Inputs:
    """Lists, NumPy arrays or tensors as tensors on the model's device, checked where there are values to look at."""
    if not isinstance(past_key_values, KVCache | None):
        found = type(past_key_values).__name__
        raise InputError(f"past_key_values must be a KVCache, as KVCache.allocate or a call returns it, got {found}.")
    traced = is_traced(input_ids, attention_mask, position_ids, inputs_embeds, document_ids)
    ids = integers("input_ids", input_ids, device)
    positions = integers("position_ids", position_ids, device)
    documents = integers("document_ids", document_ids, device)
    if inputs_embeds is not None and not isinstance(inputs_embeds, Tensor):
        inputs_embeds = from_numpy(np.asarray(inputs_embeds))
    mask = attention_mask
    if mask is not None and traced:
        mask = torch.as_tensor(mask)
    elif mask is not None:
        mask = torch.from_numpy(validate.mask(to_numpy(mask) if isinstance(mask, Tensor) else mask))
    if not traced:
        past = past_key_values
        validate.check_call(
            config,
            input_ids=_values(ids),
            inputs_embeds=_values(inputs_embeds),
            attention_mask=_values(mask),
            position_ids=_values(positions),
            document_ids=_values(documents),
            past_length=None if past is None else to_numpy(past.length),
            past_shape=None if past is None else (len(past.keys), *past.keys[0].shape),
            capacity=None if past is None else past.capacity,
        )
    told = traced and positions is not None and documents is None and mask is None and past_key_values is None
    if not traced:
        length = None if past_key_values is None else to_numpy(past_key_values.length)
        told = validate.begins_again(_values(positions), _values(mask), _values(documents), length)
    embeds = None if inputs_embeds is None else inputs_embeds.to(device)
    shape = ids.shape if ids is not None else embeds.shape[:2]
    if told:
        documents = documents_of(positions).expand(shape)
    if mask is None:
        mask = torch.ones(shape, dtype=torch.int64, device=device)
    return Inputs(ids, embeds, mask[:, mask.shape[1] - shape[1] :].to(device, torch.int64), positions, documents)


def documents_of(position_BT: Tensor) -> Tensor:
    """[B, T]: the packed document of each token where none are told: one begins where positions begin again."""
    again = position_BT[:, 1:] <= position_BT[:, :-1]
    return torch.cat([torch.zeros_like(position_BT[:, :1]), again.cumsum(1)], dim=1)


def integers(name: str, value: Any, device: torch.device, *, rank: int = 2) -> Tensor | None:
    """Token ids, positions or labels as int64 on a device; with rank 2, one dimension is a batch of one."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = np.asarray(value) if rank != 2 else validate.integers(name, value)
        return torch.from_numpy(value.astype(np.int64)).to(device)
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        validate.integers(name, to_numpy(value))
    if value.ndim == 1 and rank == 2:
        value = value[None]
    if value.ndim != rank:
        raise InputError(f"{name} must have {rank} dimensions, got the shape {tuple(value.shape)}.")
    return value.to(device, torch.int64)


def _values(array: Tensor | None) -> np.ndarray | None:
    return None if array is None else to_numpy(array)


def labels_array(config: MistralConfig, labels: Any, logits: Tensor) -> Tensor:
    """Labels of a row classifier as a tensor beside its logits [B, C]; raises InputError or TokenIdError."""
    if not isinstance(labels, Tensor):
        labels = from_numpy(np.asarray(labels))
    if not is_traced(labels, logits):
        validate.check_row_labels(config, to_numpy(labels), tuple(logits.shape))
    return labels.to(logits.device)
