"""This backend as the core and the command line see it, by the entry point `mistral.backends`."""

from __future__ import annotations

from typing import Any

import mistral_tf
from mistral_core.parameters import HEADS

from .arrays import from_numpy, to_numpy
from .attention import available


class _Backend:
    name = "tf"
    framework = "tensorflow"
    attention_implementations = available()
    to_numpy = staticmethod(to_numpy)
    from_numpy = staticmethod(from_numpy)

    def model_class(self, architecture: str) -> Any:
        """The class of this name."""
        return {name: getattr(mistral_tf, name) for name in HEADS}[architecture]


BACKEND = _Backend()
