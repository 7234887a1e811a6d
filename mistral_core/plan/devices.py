"""How much memory devices have, and the smallest mesh of them on which everything fits."""

from __future__ import annotations

import re
from typing import Any

from ..config import MistralConfig
from ..errors import ConfigError, MeshError
from .memory import Plan, plan

GB = 10**9
DEVICES = {
    # NVIDIA's data sheets of each product
    "b200": 180 * GB,
    "h200": 141 * GB,
    "h100": 80 * GB,
    "a100-80": 80 * GB,
    "a100-40": 40 * GB,
    "l40s": 48 * GB,
    "rtx5090": 32 * GB,
    "rtx4090": 24 * GB,
    "rtx3090": 24 * GB,
    "l4": 24 * GB,
    "a10": 24 * GB,
    "t4": 16 * GB,
    # AMD's data sheet
    "mi300x": 192 * GB,
    # Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e": HBM of a chip
    "tpu-v4": 32 * GB,
    "tpu-v5e": 16 * GB,
    "tpu-v5p": 95 * GB,
    "tpu-v6e": 32 * GB,
}
"""Name -> bytes, as published, a GB taken as 10^9: where the vendor means 2^30 there is 7 % more."""

RESERVE = 10
"""Percent of a device that is kept free: the framework's context, compiled programs, fragments of the allocator."""
MOST = 1024
"""Devices of the largest mesh that is tried."""
HOST = 8
"""Devices of one host, over which alone `tensor` goes: its all-reduces need the fast links between them."""

_UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def memory_of(device: str) -> int:
    """Bytes of a device by its name in `DEVICES`, or of a size such as 80GB or 79.6GiB; raises ConfigError."""
    name = device.strip().lower()
    if name in DEVICES:
        return DEVICES[name]
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([mgt]i?b)", name)
    if found is None:
        raise ConfigError(f"device must be a size such as 80GB or one of {', '.join(DEVICES)}, got {device!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def fits(planned: Plan, memory: int) -> bool:
    """Whether a plan leaves `RESERVE` percent of a device's bytes free."""
    return planned.total <= usable(memory)


def usable(memory: int) -> int:
    """Bytes of a device without its reserve."""
    return memory * (100 - RESERVE) // 100


def suggest(config: MistralConfig, memory: int, **options: Any) -> Plan | None:
    """The plan of the smallest mesh of devices of so many bytes on which everything fits; None: on none up to `MOST`.

    Fewest devices first, in powers of two; of as many, the most over `tensor`, up to the `HOST`, and the others over
    `fsdp`. `options` are those of `plan`. Raises ConfigError and InputError as `plan` does.
    """
    count = 1
    while count <= MOST:
        tensor = min(count, HOST)
        while tensor:
            mesh = {"fsdp": count // tensor, "tensor": tensor}
            found = _planned(config, {axis: size for axis, size in mesh.items() if size > 1}, options)
            if found is not None and fits(found, memory):
                return found
            tensor //= 2
        count *= 2
    return None


def _planned(config: MistralConfig, mesh: dict[str, int], options: dict[str, Any]) -> Plan | None:
    """The plan, or None where the mesh cannot cut the model."""
    try:
        return plan(config, mesh, **options)
    except MeshError:
        return None
