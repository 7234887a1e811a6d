"""What is true of Mistral in any framework: config, parameters, the float64 specification, checkpoints, text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AssignableConfig
    from .config import Ministral3Config as Ministral3Config
    from .config import MinistralConfig as MinistralConfig
    from .config import MistralConfig as MistralConfig
    from .generation import GenerationConfig as GenerationConfig
    from .generation.hooks import LogitsProcessor as LogitsProcessor
    from .generation.hooks import LogitsProcessorList as LogitsProcessorList
    from .generation.hooks import StoppingCriteria as StoppingCriteria
    from .generation.hooks import StoppingCriteriaList as StoppingCriteriaList
    from .pictures import AttentionMaskVisualizer as AttentionMaskVisualizer
    from .pictures import AttentionVisualizer as AttentionVisualizer
    from .pipelines import pipeline as pipeline
    from .pipelines.conversation import Conversation as Conversation
    from .text.mistral_common import MistralCommonTokenizer as MistralCommonTokenizer
    from .text.stream import TextIteratorStreamer as TextIteratorStreamer
    from .text.stream import TextStreamer as TextStreamer
    from .text.tokenizer import MistralTokenizer as MistralTokenizer
    from .weights.convert import convert as convert

    AutoConfig = AssignableConfig
    AutoTokenizer = MistralTokenizer

from ._version import __version__ as __version__
from .compat.names import named as _named

# public name -> module and name there, imported at first use so that `import mistral_core` stays fast
_PUBLIC = {
    "MistralConfig": (".config", "MistralConfig"),
    "MinistralConfig": (".config", "MinistralConfig"),
    "Ministral3Config": (".config", "Ministral3Config"),
    "GenerationConfig": (".generation", "GenerationConfig"),
    "MistralTokenizer": (".text.tokenizer", "MistralTokenizer"),
    "MistralCommonTokenizer": (".text.mistral_common", "MistralCommonTokenizer"),
    "TextStreamer": (".text.stream", "TextStreamer"),
    "TextIteratorStreamer": (".text.stream", "TextIteratorStreamer"),
    "LogitsProcessor": (".generation.hooks", "LogitsProcessor"),
    "LogitsProcessorList": (".generation.hooks", "LogitsProcessorList"),
    "StoppingCriteria": (".generation.hooks", "StoppingCriteria"),
    "StoppingCriteriaList": (".generation.hooks", "StoppingCriteriaList"),
    "AutoConfig": (".config", "AssignableConfig"),
    "AutoTokenizer": (".text.tokenizer", "MistralTokenizer"),
    "PRESETS": (".config.presets", "PRESETS"),
    "TINY": (".config.presets", "TINY"),
    "Conversation": (".pipelines.conversation", "Conversation"),
    "pipeline": (".pipelines", "pipeline"),
    "AttentionMaskVisualizer": (".pictures", "AttentionMaskVisualizer"),
    "AttentionVisualizer": (".pictures", "AttentionVisualizer"),
    "convert": (".weights.convert", "convert"),
    "MistralError": (".errors", "MistralError"),
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        return _named(__name__, name)
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module, __name__), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
