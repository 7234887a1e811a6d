"""A model that learns, as `mistral_core.training` asks for it: a guest, of which the model does not know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mistral_core.training.learner import MOMENTS, Measure, StepOutcome, check_arrays, check_learns, rows_of_logits
from mistral_core.training.settings import TrainingSettings
from mistral_core.validate import IGNORE

from .arrays import from_numpy, to_numpy
from .lora import disable_adapter, save_adapter, trained_adapters
from .losses import divided, label_log_probability, preference_loss
from .quantize import QuantizedLinear


class Learner:
    """A model and AdamW of those of its weights that learn: of an adapter where it has one that trains, else all.

    What learns is float32: of a bfloat16 model copies, to which its own weights are rounded after each step. With
    `objective="preferences"` the batches are pairs, and the model without its adapter is what it is compared with (DPO,
    arXiv 2305.18290). Raises ConfigError, UnsupportedFeatureError.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings, *, objective: str = "labels") -> None:
        self.model, self.settings, self.objective = model, settings, objective
        self._weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._adapters = trained_adapters(model)
        packed = any(isinstance(part, QuantizedLinear) for part in model.modules())
        dtype = str(model.dtype).rpartition(".")[2]
        check_learns(model, self._weights, self._adapters, dtype=dtype, packed=packed, objective=objective)
        self._wide = {
            name: each if each.dtype == torch.float32 else nn.Parameter(each.detach().float())
            for name, each in self._weights.items()
        }
        groups = []
        for decays in (True, False):
            found = [each for each in self._wide.values() if (each.ndim > 1) == decays]
            groups += [{"params": found, "weight_decay": settings.weight_decay if decays else 0.0}] if found else []
        betas = settings.b1, settings.b2
        self._optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=betas, eps=settings.eps)

    def step(self, batches: Sequence[Mapping[str, np.ndarray]], *, items: int, rate: float, number: int) -> StepOutcome:
        """Learn from the batches as from one; where a loss or the gradients are no finite numbers, nothing is moved."""
        losses, right = [], []
        device = self.model.device
        self.model.train()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed((self.settings.seed + number) % 2**63)
                for batch in batches:
                    loss, wins = self._loss(batch, items)
                    loss.backward()
                    self._add_up()
                    losses.append(loss.detach())
                    right.append(wins)
            gradients = [each.grad for each in self._wide.values()]
            norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
            won = None if self.objective == "labels" else sum(int(wins) for wins in right)
            outcome = StepOutcome(tuple(map(float, losses)), float(norm), won)
            if outcome.is_finite:
                self._move(gradients, outcome.norm, rate)
            return outcome
        finally:
            self._optimizer.zero_grad()
            self.model.zero_grad()
            self.model.eval()

    @torch.no_grad()
    def measure(self, batch: Mapping[str, np.ndarray]) -> Measure:
        """The loss of a batch, and nothing learnt."""
        self.model.eval()
        if self.objective == "preferences":
            total, _, right = self._preferences(batch)
            return Measure(float(total), int(right))
        out = self.model(**batch, num_items_in_batch=1, use_cache=False, **rows_of_logits(self.model, batch))
        if self.model.architecture == "MistralForCausalLM":
            return Measure(float(out.loss), None)
        labels = torch.as_tensor(batch["labels"], device=out.logits.device)
        return Measure(float(out.loss), int(((out.logits.argmax(-1) == labels) & (labels != IGNORE)).sum()))

    def arrays(self) -> dict[str, np.ndarray]:
        """Each of MOMENTS of each weight that learns, "weights.model.norm.weight" and so on, float32."""
        found = {}
        for name, wide in self._wide.items():
            state = self._optimizer.state.get(wide, {})
            zeros = torch.zeros_like(wide)
            tensors = wide, state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
            found |= {f"{moment}.{name}": to_numpy(tensor) for moment, tensor in zip(MOMENTS, tensors, strict=True)}
        return found

    @torch.no_grad()
    def restore(self, arrays: Mapping[str, np.ndarray], *, steps: int) -> None:
        """Go on after so many steps from what `arrays` gave; raises MissingTensorsError, ShapeMismatchError."""
        check_arrays(arrays, {name: tuple(wide.shape) for name, wide in self._wide.items()})
        for name, wide in self._wide.items():
            weight, first, second = (from_numpy(arrays[f"{moment}.{name}"]).to(wide.device) for moment in MOMENTS)
            wide.copy_(weight)
            self._weights[name].copy_(weight)
            state = {"step": torch.tensor(float(steps)), "exp_avg": first.clone(), "exp_avg_sq": second.clone()}
            self._optimizer.state[wide] = state

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter that learns in peft's files, or the whole model."""
        if self._adapters:
            save_adapter(self.model, directory, name=self._adapters[0])
        else:
            self.model.save_pretrained(directory)

    def _loss(self, batch: Mapping[str, np.ndarray], items: int) -> tuple[Tensor, Any]:
        if self.objective == "labels":
            return self.model(**batch, num_items_in_batch=items, use_cache=False).loss, None
        total, count, right = self._preferences(batch)
        return divided(total, count, items), right

    def _preferences(self, batch: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the losses of pairs, their number, and how many are right."""
        labels = torch.as_tensor(batch["labels"], device=self.model.device)
        arrays = {name: array for name, array in batch.items() if name != "labels"}
        trains = self.model.training
        with torch.no_grad(), disable_adapter(self.model):
            before = label_log_probability(self.model.eval()(**arrays, use_cache=False).logits, labels)
        after = label_log_probability(self.model.train(trains)(**arrays, use_cache=False).logits, labels)
        return preference_loss(after, before, (labels != IGNORE).any(-1), beta=self.settings.beta)

    def _add_up(self) -> None:
        """Add the gradients of a batch to those before, in float32."""
        for name, wide in self._wide.items():
            own = self._weights[name]
            if own is wide:
                wide.grad = torch.zeros_like(wide) if wide.grad is None else wide.grad
                continue
            fresh = torch.zeros_like(wide) if own.grad is None else own.grad.float()
            wide.grad = fresh if wide.grad is None else wide.grad + fresh
            own.grad = None

    @torch.no_grad()
    def _move(self, gradients: Sequence[Tensor], norm: float, rate: float) -> None:
        if (factor := self.settings.factor(norm)) < 1:
            for gradient in gradients:
                gradient *= factor
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        for name, wide in self._wide.items():
            if self._weights[name] is not wide:
                self._weights[name].copy_(wide)
