"""The commands that this package adds to `mistral`: the entry points `mistral.commands`."""

from __future__ import annotations

from mistral_core.cli import Command

CHECK = Command("whether the installed backends agree with the reference on a checkpoint", "conformance.check")
