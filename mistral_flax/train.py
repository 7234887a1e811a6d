"""A model that learns, as `mistral_core.training` asks for it: a guest, of which the model does not know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

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

    def __init__(self, model: nnx.Module, settings: TrainingSettings, *, objective: str = "labels") -> None:
        self.model, self.settings, self.objective = model, settings, objective
        self._adapters = trained_adapters(model)
        kind = nnx.LoRAParam if self._adapters else nnx.Param
        self._graph, self._weights, self._rest = nnx.split(model, kind, ...)
        packed = any(isinstance(part, QuantizedLinear) for _, part in nnx.iter_graph(model))
        dtype = jnp.dtype(model.dtype).name
        names = self._names(self._weights)
        check_learns(model, names, self._adapters, dtype=dtype, packed=packed, objective=objective)
        self._plain = self._graph
        if objective == "preferences":
            with disable_adapter(model):
                self._plain, _, _ = nnx.split(model, kind, ...)
        self._wide = jax.tree.map(lambda each: each.astype(jnp.float32), self._weights)
        self._optimizer = optax.chain(
            optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
            optax.add_decayed_weights(settings.weight_decay, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        )
        self._moments = self._optimizer.init(self._wide)
        self._gradients, self._measured = jax.jit(self._gradients_of), jax.jit(self._measured_of)
        self._added = jax.jit(lambda *trees: jax.tree.map(jnp.add, *trees), donate_argnums=0)
        self._norm, self._moved = jax.jit(optax.tree.norm), jax.jit(self._moved_by, donate_argnums=(0, 1))

    def step(self, batches: Sequence[Mapping[str, np.ndarray]], *, items: int, rate: float, number: int) -> StepOutcome:
        """Learn from the batches as from one; where a loss or the gradients are no finite numbers, nothing is moved."""
        key = jax.random.key(np.uint32(self.settings.seed & 0xFFFFFFFF))
        key = jax.random.fold_in(jax.random.fold_in(key, np.uint32(self.settings.seed >> 32)), np.uint32(number))
        losses, right, gradients = [], [], None
        for place, batch in enumerate(batches):
            (loss, wins), of_batch = self._gradients(
                self._weights, self._rest, _arrays(batch), jnp.float32(items), jax.random.fold_in(key, np.uint32(place))
            )
            gradients = of_batch if gradients is None else self._added(gradients, of_batch)
            losses.append(loss)
            right.append(wins)
        won = None if self.objective == "labels" else sum(int(wins) for wins in right)
        outcome = StepOutcome(tuple(map(float, losses)), float(self._norm(gradients)), won)
        if outcome.is_finite:
            factor = self.settings.factor(outcome.norm)
            self._wide, self._moments = self._moved(
                self._wide, self._moments, gradients, jnp.float32(rate), jnp.float32(factor)
            )
            self._put_back()
        return outcome

    def measure(self, batch: Mapping[str, np.ndarray]) -> Measure:
        """The loss of a batch, and nothing learnt."""
        total, right = self._measured(self._weights, self._rest, _arrays(batch))
        is_told = self.objective == "preferences" or self.model.architecture != "MistralForCausalLM"
        return Measure(float(total), int(right) if is_told else None)

    def arrays(self) -> dict[str, np.ndarray]:
        """Each of MOMENTS of each weight that learns, "weights.model.norm.weight" and so on, float32."""
        adam = self._moments[0]
        trees = dict(zip(MOMENTS, (self._wide, adam.mu, adam.nu), strict=True))
        return {
            f"{moment}.{name}": to_numpy(array)
            for moment, tree in trees.items()
            for name, array in zip(self._names(tree), jax.tree.leaves(tree), strict=True)
        }

    def restore(self, arrays: Mapping[str, np.ndarray], *, steps: int) -> None:
        """Go on after so many steps from what `arrays` gave; raises MissingTensorsError, ShapeMismatchError."""
        names, (leaves, structure) = self._names(self._wide), jax.tree.flatten(self._wide)
        check_arrays(arrays, {name: leaf.shape for name, leaf in zip(names, leaves, strict=True)})
        trees = [
            structure.unflatten(from_numpy(np.asarray(arrays[f"{moment}.{name}"])) for name in names)
            for moment in MOMENTS
        ]
        self._wide = trees[0]
        adam = self._moments[0]._replace(count=jnp.int32(steps), mu=trees[1], nu=trees[2])
        self._moments = (adam, *self._moments[1:])
        self._put_back()

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter that learns in peft's files, or the whole model."""
        if self._adapters:
            save_adapter(self.model, directory, name=self._adapters[0])
        else:
            self.model.save_pretrained(directory)

    @staticmethod
    def _names(tree: Any) -> list[str]:
        """The names of arrays in the order of a tree's leaves."""
        return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)]

    def _put_back(self) -> None:
        """Let the model have the weights that were moved."""
        self._weights = jax.tree.map(lambda own, wide: wide.astype(own.dtype), self._weights, self._wide)
        nnx.update(self.model, self._weights)

    def _gradients_of(self, weights: Any, rest: Any, batch: Any, items: Array, key: Array) -> Any:
        """The loss of a batch and how many pairs are right, and gradients in float32."""

        def loss(weights: Any) -> tuple[Array, Array]:
            if self.objective == "preferences":
                total, count, right = self._preferences(weights, rest, batch, key)
                return divided(total, count, items), right
            model = nnx.merge(self._graph, weights, rest)
            return model(**batch, num_items_in_batch=items, use_cache=False, rngs=key).loss, jnp.int32(0)

        found, gradients = jax.value_and_grad(loss, has_aux=True)(weights)
        return found, jax.tree.map(lambda each: each.astype(jnp.float32), gradients)

    def _measured_of(self, weights: Any, rest: Any, batch: Any) -> tuple[Array, Array]:
        """The sum of a batch's losses, and how much of it is right."""
        if self.objective == "preferences":
            total, _, right = self._preferences(weights, rest, batch, None)
            return total, right
        model = nnx.merge(self._graph, weights, rest)
        out = model(**batch, num_items_in_batch=1, use_cache=False, **rows_of_logits(model, batch))
        if model.architecture == "MistralForCausalLM":
            return out.loss, jnp.int32(0)
        labels = batch["labels"]
        return out.loss, ((out.logits.argmax(-1) == labels) & (labels != IGNORE)).sum()

    def _preferences(self, weights: Any, rest: Any, batch: Any, key: Any) -> tuple[Array, Array, Array]:
        """The sum of the losses of pairs, their number, and how many are right."""
        labels, arrays = batch["labels"], {name: array for name, array in batch.items() if name != "labels"}
        before, after = nnx.merge(self._plain, weights, rest), nnx.merge(self._graph, weights, rest)
        reference = label_log_probability(before(**arrays, use_cache=False).logits, labels)
        policy = label_log_probability(after(**arrays, use_cache=False, rngs=key).logits, labels)
        counted = (labels != IGNORE).any(-1)
        return preference_loss(policy, jax.lax.stop_gradient(reference), counted, beta=self.settings.beta)

    def _moved_by(self, wide: Any, moments: Any, gradients: Any, rate: Array, factor: Array) -> tuple[Any, Any]:
        gradients = jax.tree.map(lambda each: each * factor, gradients)
        changes, moments = self._optimizer.update(gradients, moments, wide)
        return jax.tree.map(lambda each, change: each - rate * change, wide, changes), moments


def _arrays(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}
