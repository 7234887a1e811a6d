"""What a user means by a device, in any framework's words, and which of the devices that are here it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import ConfigError
from .plain import plain_int
from .telling import shown

CPU, GPU = "cpu", "gpu"
NOWHERE = "meta"
"""Where PyTorch keeps shapes without numbers."""
NAMES = {"cuda": GPU, "rocm": GPU, "hip": GPU}
"""What a kind of device is called elsewhere -> here."""

_WORDS = re.compile(r"(?:/job:\w+)?(?:/replica:\d+)?(?:/task:\d+)?/?(?:(?:physical_)?device:)?([a-z]+)(?::(\d{1,4}))?")


class Device(NamedTuple):
    """A kind of device and which one of it; no kind means any accelerator, no number the first."""

    kind: str | None
    number: int | None


def parse(given: Any) -> Device:
    """A device from a number (-1 is the CPU, others are accelerators), a name, or an object of any framework.

    "cuda", "cuda:1", "gpu:0", "/GPU:0" and "/device:GPU:0" are such names, and so are digits. Raises ConfigError.
    """
    value = plain_int(given)
    if isinstance(value, str) and re.fullmatch(r"-1|\d{1,4}", value.strip()):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < -1:
            raise ConfigError(f"device must be -1 (the CPU) or the number of a GPU, got {shown(value)}.")
        return Device(CPU, None) if value == -1 else Device(None, value)
    words = value if isinstance(value, str) else _words_of(value)
    found = _WORDS.fullmatch(words.strip().lower()) if words is not None else None
    if found is None:
        raise ConfigError(
            "device must be a number, a name such as 'cpu', 'cuda' or 'gpu:0', or a framework's device, "
            f"got {shown(given)}."
        )
    kind, index = found.groups()
    return Device(NAMES.get(kind, kind), None if index is None else int(index))


def find(given: Any, here: Mapping[str, Sequence[Any]], *, framework: str) -> Any:
    """The device that is meant, of those `here` by kind; "auto" is the first accelerator, or else the CPU.

    Raises ConfigError for a device that is not here.
    """
    accelerators = [device for kind, devices in here.items() if kind not in (CPU, NOWHERE) for device in devices]
    if isinstance(given, str) and given == "auto":
        return accelerators[0] if accelerators else here[CPU][0]
    kind, number = parse(given)
    among = accelerators if kind is None else here.get(kind, ())
    if (number or 0) >= len(among):
        names = ", ".join(f"{each}:{place}" for each, devices in here.items() for place in range(len(devices)))
        raise ConfigError(f"device: {shown(given)} is not here; {framework} sees {names}.")
    return among[number or 0]


def _words_of(device: Any) -> str | None:
    """A device object of PyTorch (type, index), JAX (platform, id) or TensorFlow (name) in words."""
    kind = getattr(device, "type", None) or getattr(device, "platform", None)
    if isinstance(kind, str):
        index = getattr(device, "index", getattr(device, "id", None))
        return kind if index is None else f"{kind}:{index}"
    name = getattr(device, "name", None)
    return name if isinstance(name, str) else None


def placement(device: Any, as_device: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Where each tensor goes, by its canonical name: `device` for all of them, or what `device` says of a name.

    `as_device` makes of a device what the framework calls it. Raises ConfigError for a device that is not here.
    """
    if not isinstance(device, str) and callable(device):
        return lambda name: as_device(device(name))
    found = as_device(device)
    return lambda name: found
