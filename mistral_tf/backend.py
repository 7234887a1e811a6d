"""This backend as the core and the command line see it, by the entry point `mistral.backends`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mistral_tf
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import HEADS
from mistral_core.training import TrainingSettings

from .arrays import from_numpy, to_numpy
from .attention import Visibility, attention_mask, available
from .layers import token_order
from .lora import add_adapter
from .train import Learner


class _Backend:
    name = "tf"
    framework = "tensorflow"
    attention_implementations = available()
    fixed_shapes = False
    to_numpy = staticmethod(to_numpy)
    from_numpy = staticmethod(from_numpy)
    token_order = staticmethod(token_order)

    def model_class(self, architecture: str) -> Any:
        """The class of this name."""
        return {name: getattr(mistral_tf, name) for name in HEADS}[architecture]

    def attention_mask(
        self, query_order_BT: Any, key_order_BS: Any, window: int | None, *, document_ids_BT: Any = None
    ) -> Any:
        """Which keys each query sees."""
        return attention_mask(Visibility(query_order_BT, key_order_BS, window, document_ids_BT))

    def inference(self, model: Any) -> AbstractContextManager[None]:
        """Nothing to be done: gradients and dropout are asked for by name."""
        return nullcontext()

    def forward(self, model: Any, **arrays: Any) -> Any:
        """What such a call returns."""
        return model(**arrays, use_cache=False, return_dict=True)

    def learner(self, model: Any, settings: TrainingSettings, *, objective: str = "labels") -> Learner:
        """The model as one that learns."""
        return Learner(model, settings, objective=objective)

    def add_adapter(self, model: Any, config: LoraConfig, *, seed: int = 0) -> Any:
        """The model with a fresh adapter, which alone learns."""
        return add_adapter(model, config, seed=seed)


BACKEND = _Backend()
