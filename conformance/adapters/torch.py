"""mistral_torch behind NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from .base import Adapter


class Recorder(torch.nn.Module):
    """A module with another one inside, as users and libraries put it into a model; tells when it is called."""

    def __init__(self, module: Any, called: Any) -> None:
        super().__init__()
        self.inner, self.called = module, called

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.called()
        return self.inner(*arguments, **options)

    @property
    def weight(self) -> Any:
        return self.inner.weight

    @property
    def bias(self) -> Any:
        return self.inner.bias


class BackendAdapter(Adapter):
    name = "torch"

    def array(self, value: Any, dtype: str | None = None) -> Any:
        array = torch.from_numpy(np.array(value, np.float32 if dtype else None))
        return array.to(self.device, getattr(torch, dtype) if dtype else None)

    def numpy(self, array: Any) -> Any:
        array = array.detach().cpu()
        if array.dtype == torch.bfloat16:
            return array.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()

    def model(self, architecture: str, config: Any, parameters: Any, dtype: str, implementation: str) -> Any:
        kind = getattr(self.package, architecture)
        with torch.device("meta"):
            model = kind(config, attn_implementation=implementation)
        for name, array in parameters.items():
            model.set_parameter(name, np.array(array).astype(dtype), device=self.device)
        model.tie_weights()
        return model.eval()

    def call(self, model: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return model(**inputs)

    def loss_and_gradients(self, model: Any, inputs: Any) -> Any:
        loss = model(**inputs).loss
        loss.backward()
        # a parameter that the call did not use has no gradient at all
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        gradients = {name: self.numpy(grad) for name, grad in grads.items()}
        model.zero_grad(set_to_none=True)
        return self.numpy(loss), gradients

    def layer(self, model: Any, index: int) -> Any:
        return model.model.layers[index]

    def recorder(self, module: Any, called: Any) -> Any:
        return Recorder(module, called)
