"""A model whose parts are on several devices of one process, or on disk: accelerate's hooks move what they meet.

transformers' arguments `device_map`, `max_memory` and `offload_folder` ask for it. Over several processes a model is
cut by `sharding` instead, where all compute at the same time.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mistral_core.errors import ConfigError, UnsupportedFeatureError
from mistral_core.extras import require
from mistral_core.parameters import parameters
from mistral_core.weights.loading import Weight

from .arrays import as_device, as_dtype, from_numpy

LOG = logging.getLogger("mistral.torch")
DISK = "disk"
"""Where parts are that no memory has room for: files in `offload_folder`."""
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""What `device_map` says where accelerate is to find out."""


class Dispatch(NamedTuple):
    """What was asked for: devices of parts of the model, or how to find them."""

    device_map: str | Mapping[str, Any]
    max_memory: Mapping[Any, Any] | None
    offload_folder: str | os.PathLike[str] | None

    @classmethod
    def asked(cls, options: dict[str, Any]) -> Dispatch | None:
        """What arguments of `from_pretrained` ask for, which are taken out; None where one device is meant.

        Raises ConfigError for a device that is not here.
        """
        device_map, memory = options.get("device_map"), options.get("max_memory")
        parts = isinstance(device_map, Mapping) and set(device_map) != {""}
        automatic = isinstance(device_map, str) and device_map in AUTOMATIC
        if automatic and memory is None and _is_one_device():
            options.pop("offload_folder", None)
            return None
        if not (parts or automatic):
            return None
        device_map = _devices(device_map) if isinstance(device_map, Mapping) else device_map
        del options["device_map"]
        return cls(device_map, options.pop("max_memory", None), options.pop("offload_folder", None))

    def of(self, model: nn.Module, dtype: str) -> Dispatched:
        """Where the parts of a model of shapes go; what that takes is told.

        Raises ConfigError for a map that leaves out a part, and MissingExtraError where accelerate is not there.
        """
        model.to(as_dtype(dtype))
        device_map = self.device_map
        if isinstance(device_map, str):
            accelerate = require("accelerate", "offload", what=f"device_map={device_map!r}")
            parts, memory = list(model._no_split_modules), self.max_memory
            if device_map != "sequential":
                memory = accelerate.utils.get_balanced_memory(
                    model, memory, parts, low_zero=device_map == "balanced_low_0"
                )
            device_map = _devices(accelerate.infer_auto_device_map(model, memory, parts))
        dispatched = Dispatched(model, device_map, self.offload_folder)
        dispatched.tell()
        return dispatched


class Dispatched:
    """Where each part of a model goes, and what is on disk so far."""

    def __init__(self, model: nn.Module, device_map: Mapping[str, Any], folder: str | os.PathLike[str] | None) -> None:
        self.model, self.device_map, self.index = model, dict(device_map), dict[str, Any]()
        left = [name for name, _ in parameters(model.config, model.architecture) if self._part(name) is None]
        if left:
            raise ConfigError(f"device_map must say where {left[0]!r} goes, got {', '.join(map(repr, device_map))}.")
        if DISK in self.device_map.values() and folder is None:
            raise ConfigError("offload_folder: parts of the model go to disk; say in which directory.")
        self.folder = None if folder is None else Path(folder)

    def _part(self, name: str) -> str | None:
        """The longest name of a part in the map that a parameter is in."""
        own = self.model._own_name(name)
        found = [part for part in self.device_map if part == "" or own == part or own.startswith(f"{part}.")]
        return max(found, key=len, default=None)

    def device(self, name: str) -> torch.device | str:
        """Where a parameter of this canonical name goes: a device, or `DISK`."""
        part = self._part(name)
        assert part is not None
        return self.device_map[part]

    def place(self, name: str) -> torch.device:
        """The device of a packed matrix; raises UnsupportedFeatureError where it would go to disk."""
        device = self.device(name)
        if device == DISK:
            raise UnsupportedFeatureError(
                f"device_map: {name} is packed, and packed matrices stay in memory; give max_memory that they fit "
                "into, or quantization='dequantize'."
            )
        return device

    def hold(self, weight: Weight) -> None:
        """Put a parameter where it goes; one on disk is read from there by each call."""
        if self.device(weight.name) != DISK:
            self.model.set_parameter(weight.name, weight.read(), device=self.device(weight.name))
            return
        from accelerate.utils import offload_weight

        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = offload_weight(
            from_numpy(weight.read()), self.model._own_name(weight.name), self.folder, self.index
        )

    def finished(self) -> None:
        """Let accelerate's hooks move what each part meets, now that every parameter is where it goes."""
        accelerate = require("accelerate", "offload", what="device_map of several parts")
        if self.index:
            accelerate.utils.save_offload_index(self.index, self.folder)
        skipped = list(self.model._skip_keys_device_placement)
        accelerate.dispatch_model(self.model, self.device_map, offload_dir=self.folder, skip_keys=skipped)

    def tell(self) -> None:
        """Say how much memory each device gives; as a warning where parts are not where they are computed."""
        held: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            device = str(self.device(name))
            held[device] = held.get(device, 0) + math.prod(parameter.shape) * parameter.element_size()
        told = ", ".join(f"{device} {size / 1e6:.2f} MB" for device, size in held.items())
        slow = DISK in held or ("cpu" in held and len(held) > 1)
        LOG.log(logging.WARNING if slow else logging.INFO, "device_map: %s", told)


def _devices(device_map: Mapping[str, Any]) -> dict[str, Any]:
    """The devices of parts in torch's words; raises ConfigError for one that is not here."""
    return {name: DISK if device == DISK else as_device(device) for name, device in device_map.items()}


def _is_one_device() -> bool:
    """Whether there is nothing to choose from: no accelerator, or one and nothing that could put a rest elsewhere."""
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    return count == 0 or (count == 1 and importlib.util.find_spec("accelerate") is None)
