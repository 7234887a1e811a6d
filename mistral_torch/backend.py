"""This backend as the core and the command line see it, by the entry point `mistral.backends`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import mistral_torch
from mistral_core.lora.config import LoraConfig
from mistral_core.parameters import HEADS
from mistral_core.training import TrainingSettings

from .arrays import from_numpy, to_numpy
from .attention import Visibility, attention_mask, available
from .layers import token_order
from .lora import add_adapter
from .train import Learner


class _Backend:
    name = "torch"
    framework = "torch"
    attention_implementations = available()
    fixed_shapes = False
    to_numpy = staticmethod(to_numpy)
    from_numpy = staticmethod(from_numpy)
    token_order = staticmethod(token_order)

    def model_class(self, architecture: str) -> Any:
        """The class of this name."""
        return {name: getattr(mistral_torch, name) for name in HEADS}[architecture]

    def attention_mask(
        self, query_order_BT: Any, key_order_BS: Any, window: int | None, *, document_ids_BT: Any = None
    ) -> Any:
        """Which keys each query sees."""
        return attention_mask(Visibility(query_order_BT, key_order_BS, window, document_ids_BT))

    @contextmanager
    def inference(self, model: Any) -> Iterator[None]:
        """Without gradients, and in evaluation mode; a model that was training goes on training afterwards."""
        was_training = model.training
        model.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            model.train(was_training)

    def forward(self, model: Any, **arrays: Any) -> Any:
        """What such a call returns."""
        with self.inference(model):
            return model(**arrays, use_cache=False, return_dict=True)

    def learner(self, model: Any, settings: TrainingSettings, *, objective: str = "labels") -> Learner:
        """The model as one that learns."""
        return Learner(model, settings, objective=objective)

    def add_adapter(self, model: Any, config: LoraConfig, *, seed: int = 0) -> Any:
        """The model with a fresh adapter, which alone learns."""
        return add_adapter(model, config, seed=seed)


BACKEND = _Backend()
