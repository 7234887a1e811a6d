"""What is true of Mistral in any framework: config, parameters, the float64 specification, checkpoints, text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MistralConfig as MistralConfig
    from .generation import GenerationConfig as GenerationConfig
    from .text.tokenizer import MistralTokenizer as MistralTokenizer

from ._version import __version__ as __version__

# public name -> module, imported at first use so that `import mistral_core` stays fast
_PUBLIC = {
    "MistralConfig": ".config",
    "GenerationConfig": ".generation",
    "MistralTokenizer": ".text.tokenizer",
    "PRESETS": ".presets",
    "TINY": ".presets",
    "MistralError": ".errors",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
