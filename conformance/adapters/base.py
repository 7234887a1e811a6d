"""What an adapter is, and what the three backends share by having the same names."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from mistral_core.arrays import Array
from mistral_core.config import MistralConfig
from mistral_core.devices import CPU
from mistral_core.generation.sampling import Rule, Values
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import Quantization
from mistral_core.reference.sampling import Choice

BLOCK_COLUMNS = 4
"""The queries of a block in "blocked" attention: texts of cases are some blocks long, and no whole number of them."""


class Adapter(abc.ABC):
    """A backend behind NumPy, on one device: models and arrays are put there."""

    name: str

    def __init__(self, package: str, *, device: str = CPU) -> None:
        self.package = importlib.import_module(package)
        self.layers = importlib.import_module(package + ".layers")
        self.attention = importlib.import_module(package + ".attention")
        self.cache = importlib.import_module(package + ".cache")
        self.sampling = importlib.import_module(package + ".sampling")
        self.products = importlib.import_module(package + ".products")
        self.device = self.device_named(device)

    def short_blocks(self) -> contextlib.AbstractContextManager[object]:
        """Inside of it a block of "blocked" attention has BLOCK_COLUMNS queries; outside, what its users get."""
        blocks = f"{self.package.__name__}.blocks"
        if importlib.util.find_spec(blocks) is None:  # of others, who cut no text
            return contextlib.nullcontext()
        return mock.patch(f"{blocks}.COLUMNS", BLOCK_COLUMNS)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The attention implementations that run here."""
        return self.attention.available()

    def device_named(self, name: str) -> Any:
        """The framework's own device of a name such as "cpu" or "cuda"; raises ConfigError where it has none."""
        return importlib.import_module(self.package.__name__ + ".arrays").as_device(name)

    @abc.abstractmethod
    def array(self, value: Any, dtype: str | None = None) -> Any:
        """A NumPy array as the framework's, on the device, floats cast to `dtype`."""

    @abc.abstractmethod
    def numpy(self, array: Any) -> Array:
        """The framework's array as NumPy, bits kept."""

    @abc.abstractmethod
    def model(
        self,
        architecture: str,
        config: MistralConfig,
        parameters: Mapping[str, Array],
        dtype: str,
        implementation: str,
    ) -> Any:
        """A model of a class with these parameters, on the device, in inference mode."""

    @abc.abstractmethod
    def loss_and_gradients(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
        """The loss of a call and its gradient by canonical parameter name."""

    @abc.abstractmethod
    def layer(self, model: Any, index: int) -> Any:
        """A decoder layer of a model."""

    @abc.abstractmethod
    def recorder(self, module: Any, called: Callable[[], None]) -> Any:
        """A module that has another one inside, hands its calls on to it and records each."""

    def record(self, model: Any, name: str, calls: Counter[str]) -> None:
        """Put a recorder in the place of the module of this canonical name, such as "model.layers.0.mlp.up_proj"."""
        parent, path = model, name.split(".")
        if "layers" in path:
            parent, path = self.layer(model, int(path[2])), path[3:]
        parent = functools.reduce(getattr, path[:-1], parent)
        setattr(parent, path[-1], self.recorder(getattr(parent, path[-1]), functools.partial(calls.update, [name])))

    def pack(self, model: Any, matrices: Mapping[str, PackedMatrix]) -> Any:
        """The model, in which the tensors of these canonical names are packed."""
        quantize = importlib.import_module(self.package.__name__ + ".quantize")
        for name, matrix in matrices.items():
            quantize.put(model, name, matrix)
        return model

    def packed(self, model: Any, asked: Quantization) -> dict[str, PackedMatrix]:
        """The matrices of a model, once they are packed as a user asks for it."""
        return {name: part.matrix for name, part in self.package.quantize(model, asked).packed_parts()}

    @contextlib.contextmanager
    def without_kernels(self) -> Iterator[None]:
        """Products as they are where there is no compiler for C."""
        native = importlib.import_module(self.package.__name__ + ".native")
        with mock.patch.object(native, "available", return_value=False):
            self.forget_compiled()
            yield
        self.forget_compiled()

    def without_whole_steps(self) -> contextlib.AbstractContextManager[Any]:
        """Steps of `generate` by the framework, where C would compute them in one call."""
        native = importlib.import_module(self.package.__name__ + ".native")
        return mock.patch.object(native, "whole_step_of", return_value=None)

    def forget_compiled(self) -> None:  # noqa: B027
        """Let the framework compile functions again that it has compiled for arrays of the same shapes, if it has."""

    def packed_product(self, x: Array, matrix: PackedMatrix, dtype: str, activations: str | None = None) -> Array:
        """Rows [R, I], as they are or rounded to eight bits, times a packed matrix."""
        scale = self.array(matrix.scale, matrix.scale.dtype.name)
        zero = None if matrix.zero is None else self.array(matrix.zero)
        codes = self.array(matrix.codes)
        rounded = () if activations is None else (activations,)
        weight = self.products.PackedWeight(codes, scale, zero, matrix.kind, matrix.shape, matrix.block, *rounded)
        return self.numpy(self.products.packed_product(self.array(x, dtype), weight))

    def call(self, model: Any, **inputs: Any) -> Any:
        """The model's output, as the framework returns it."""
        return model(**inputs)

    def allocate(self, config: MistralConfig, batch_size: int, capacity: int | None, dtype: str, **options: Any) -> Any:
        """An empty KV cache."""
        kind = self.array(np.zeros(1, np.float32), dtype).dtype
        where = {} if self.device is None else {"device": self.device}
        return self.package.KVCache.allocate(config, batch_size, capacity, dtype=kind, **where, **options)

    def rotary(self, position_BT: Array, config: MistralConfig) -> tuple[Array, Array]:
        """cos and sin."""
        cos, sin = self.layers.rotary(self.array(position_BT), config)
        return self.numpy(cos), self.numpy(sin)

    def query_scale(self, position_BT: Array, config: MistralConfig) -> Array:
        """What rotated queries are multiplied by."""
        return self.numpy(self.layers.query_scale(self.array(position_BT), config))

    def rotate(self, x: Array, cos: Array, sin: Array, dtype: str) -> Array:
        """x turned by the angles."""
        return self.numpy(
            self.layers.rotate(self.array(x, dtype), self.array(cos, "float32"), self.array(sin, "float32"))
        )

    def gumbel(self, key_B2: Array, step_BT: Array, size: int) -> Array:
        """The noise of sampling."""
        return self.numpy(self.sampling.gumbel(self.array(key_B2), self.array(step_BT), size))

    def choose(self, logits: Array, rule: Rule, values: Values) -> Choice:
        """What is chosen from logits."""
        given = Values(*(None if value is None else self.array(value) for value in values))
        token, scores, candidates, _ = self.sampling.choose(self.array(logits), rule, given)
        best = None
        if candidates is not None:
            noisy, scored, tokens = map(self.numpy, candidates)
            best = noisy, scored, tokens
        return Choice(self.numpy(token), None if scores is None else self.numpy(scores), best)

    def mask(self, query_order: Array, key_order: Array, window: int | None, document_ids: Array | None) -> Array:
        """Which keys each query sees."""
        documents = None if document_ids is None else self.array(document_ids)
        query, key = self.array(query_order), self.array(key_order)
        return self.numpy(self.attention.attention_mask(self.attention.Visibility(query, key, window, documents)))
