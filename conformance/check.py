"""`mistral check PATH`: whether the installed backends agree with the reference on a checkpoint."""

from __future__ import annotations

import argparse

from mistral_core import backend as backends
from mistral_core import devices
from mistral_core.cli import backends_argument, loading_arguments, progress, put
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.errors import UnsupportedFeatureError

from . import checkpoint, report


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", nargs="?", help="a checkpoint directory or a hub id; default: the embedded one")
    backends_argument(command)
    loading_arguments(command, dtype="float32")


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 where everything agrees, 1 where something does not."""
    if options.device not in (None, "auto") and devices.parse(options.device).kind != devices.CPU:
        raise UnsupportedFeatureError(f"--device: {options.device!r}; what is compared is computed on the CPU.")
    names = options.backend or list(backends.installed())
    if not names:
        raise backends.none_installed()
    for name in names:
        backends.get(name)
    found = []
    for name in names:
        progress(f"checking {name}")
        found += checkpoint.check(
            options.path or TINY_CHECKPOINT,
            name,
            dtype="float32" if options.dtype in (None, "auto") else options.dtype,
            implementation=options.attn_implementation,
        )
    put(report.as_json(found) if options.json else report.table(report.worst(found)))
    return 0 if all(item.passed for item in found) else 1
