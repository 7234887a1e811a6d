"""LoRA adapters in a finished model: a guest of which layers.py and model.py know nothing.

Files are peft's (`mistral_core.lora`), and peft itself takes these models too; this is the same in every framework. An
adapter computes in float32 beside a base that is frozen and may be packed (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral_core.lora import adapter as files
from mistral_core.lora import models
from mistral_core.lora.adapter import Adapter, LoraWeights
from mistral_core.lora.config import LoraConfig as LoraConfig
from mistral_core.lora.config import LoraTarget

from .arrays import from_numpy, to_numpy
from .layers import Head
from .quantize import QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)


class LowRank(nn.Module):
    """What one adapter adds to one matrix: scaling times b a, and of DoRA the lengths of rows."""

    def __init__(self, weights: LoraWeights, scaling: float, dropout: float, *, device: torch.device) -> None:
        super().__init__()
        self.scaling, self.dropout = scaling, dropout
        self.a = nn.Parameter(from_numpy(weights.a).to(device))
        self.b = nn.Parameter(from_numpy(weights.b).to(device))
        lengths = weights.magnitude
        self.magnitude = None if lengths is None else nn.Parameter(from_numpy(lengths).to(device))

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None) -> Tensor:
        """What is added to y = x W^T, in float32; the lengths of rows of W + s b a are constants to gradients."""
        dropped = F.dropout(x.to(self.a.dtype), self.dropout, self.training)
        z = F.linear(F.linear(dropped, self.a), self.b) * self.scaling
        if self.magnitude is None or weight is None:
            return z
        with torch.no_grad():
            wide = weight.to(self.a.dtype)
            norm = torch.linalg.vector_norm(wide + self.scaling * (self.b @ self.a), dim=1)
        factor = self.magnitude / norm
        base = F.linear(dropped, wide) if self.training and self.dropout else y.to(self.a.dtype)
        return (factor - 1) * base + factor * z


class Adapted(nn.Module):
    """A part of a model with adapters of its own, by name; those in `active` are added, one after another."""

    lora: nn.ModuleDict
    saved: nn.ModuleDict
    """Copies of the whole part, each of which takes its place while its adapter is active."""
    active: tuple[str, ...]
    merged: tuple[str, ...]
    """The adapters that are folded into the weight."""

    @property
    def adds(self) -> tuple[str, ...]:
        """The adapters with which a call computes more than the part's own weights."""
        return tuple(name for name in self.active if name not in self.merged)

    def _own(self, x: Tensor) -> Tensor:
        for name in reversed(self.adds):
            if name in self.saved:
                y = self.saved[name](x.to(self.saved[name].weight.dtype) if x.is_floating_point() else x)
                wide = getattr(self, "is_head", isinstance(self, Head))
                return y if wide else y.to(x.dtype if x.is_floating_point() else self.weight.dtype)
        return super().forward(x)

    def _each(self) -> Iterator[LowRank]:
        return (self.lora[name] for name in self.adds if name in self.lora)


class AdaptedLinear(Adapted, nn.Linear):
    """x W^T, and what adapters add to it."""

    def forward(self, x: Tensor) -> Tensor:
        y = result = self._own(x)
        bare = y if self.bias is None else y - self.bias
        for low in self._each():
            result = result + low(x, bare, None if low.magnitude is None else self.weight)
        return result.to(y.dtype)


class AdaptedHead(AdaptedLinear, Head):
    """A head, and what adapters add to it."""


class AdaptedQuantizedLinear(AdaptedLinear, QuantizedLinear):
    """The product with a packed matrix, and what adapters add to it."""


class AdaptedEmbedding(Adapted, nn.Embedding):
    """The embeddings of tokens, and what adapters add to them."""

    def forward(self, ids: Tensor) -> Tensor:
        y = result = self._own(ids)
        for low in self._each():
            result = result + F.linear(F.embedding(ids, low.b), low.a.mT) * low.scaling
        return result.to(y.dtype)


_KINDS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    Head: AdaptedHead,
    QuantizedLinear: AdaptedQuantizedLinear,
    nn.Embedding: AdaptedEmbedding,
}
"""Classes of parts -> the class of the same part with adapters."""


def add_adapter(model: Model, config: LoraConfig | None = None, *, name: str = "default", seed: int = 0) -> Model:
    """Give a model a fresh adapter, which alone trains, in place, and return it; without a config peft's defaults.

    Every framework begins with the same numbers for a seed. Raises ConfigError, UnsupportedFeatureError.
    """
    return _put(model, models.fresh(model, config, seed=seed), name, trains=True)


def load_adapter(
    model: Model, path: str | os.PathLike[str], *, name: str = "default", is_trainable: bool = False
) -> Model:
    """Give a model the adapter of a directory that peft, or any framework here, wrote, in place, and return it.

    Raises what `mistral_core.lora.adapter.load` raises, ConfigError for a name that is there.
    """
    found = files.load(path, model.config.value, model.architecture)
    for each, array in found.base.items():
        if not model._is_packed(each):
            model.set_parameter(each, array.astype(to_numpy(model.get_parameter(model._own_name(each))).dtype))
    model.tie_weights()
    return _put(model, found, name, trains=is_trainable)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default") -> None:
    """Write an adapter as peft does, in one atomic step; raises ConfigError for a name that is not there."""
    files.save(directory, adapter_of(model, name), model.config.value, model.architecture)


def adapter_of(model: nn.Module, name: str = "default") -> Adapter:
    """An adapter's numbers in NumPy; raises ConfigError for a name that is not there."""
    lora, weights, saved = _config(model, name), {}, {}
    for each in lora.targets(model.config.value, model.architecture):
        weights[each] = _weights(model._module(each).lora[name])
    for each, _ in lora.saved(model.config.value, model.architecture):
        copy = model._module(each).saved[name]
        saved[each] = to_numpy(getattr(copy, each.rpartition(".")[2]).float())
    return Adapter(lora, weights, saved)


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let these adapters compute and train, and no others; raises ConfigError for a name that is not there."""
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _config(model, name)
    models.refuse_merged(list(_parts(model)))
    for part in _parts(model):
        part.active = names
    for name, low in _lows(model):
        low.requires_grad_(name in names)


def trained_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that train."""
    trains = {name for name, low in _lows(model) if any(each.requires_grad for each in low.parameters())}
    return tuple(name for name in model.__dict__.get("peft_configs", {}) if name in trains)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes without its adapters."""
    with models.disabled(list(_parts(model))):
        yield


@torch.no_grad()
def merge(model: Model) -> Model:
    """Fold the active adapters into the weights of a model of floats, in place, and return it; `unmerge` undoes it.

    Weights are rounded once to their dtype. Raises UnsupportedFeatureError for packed matrices, into which a change may
    vanish, and where one tensor is embedding and head.
    """
    parts = [(name, part) for name, part in _named_parts(model) if part.active and not part.merged]
    for name, part in parts:
        _refuse_merging(model, name, part)
    for _, part in parts:
        part.unmerged = {each: parameter.detach().clone() for each, parameter in part.named_parameters(recurse=False)}
        for each in part.active:
            if each in part.saved:
                for own, value in part.saved[each].named_parameters(recurse=False):
                    getattr(part, own).copy_(value)
            if each in part.lora:
                low = part.lora[each]
                part.weight.copy_(from_numpy(files.folded(to_numpy(part.weight), _weights(low), low.scaling)))
        part.merged = part.active
    model.tie_weights()
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Put back the weights as they were before `merge`, bit for bit, and return the model."""
    for part in _parts(model):
        for each, value in getattr(part, "unmerged", {}).items():
            getattr(part, each).copy_(value)
        part.unmerged, part.merged = {}, ()
    return model


def _weights(low: LowRank) -> LoraWeights:
    magnitude = None if low.magnitude is None else to_numpy(low.magnitude.float())
    return LoraWeights(to_numpy(low.a.float()), to_numpy(low.b.float()), magnitude)


def _targets(model: nn.Module, lora: LoraConfig) -> dict[str, LoraTarget]:
    return lora.targets(model.config.value, model.architecture)


def _put(model: Model, adapter: Adapter, name: str, *, trains: bool) -> Model:
    configs = model.__dict__.setdefault("peft_configs", {})
    models.check_new(name, configs)
    targets = _targets(model, adapter.config)
    wanted = {each: model._module(each) for each in (*targets, *adapter.saved)}
    for each, part in wanted.items():
        if type(part) not in _KINDS and not isinstance(part, Adapted):
            models.refuse_part(each, part)
    models.refuse_merged(list(_parts(model)))
    if not any(isinstance(part, Adapted) for part in model.modules()):
        model.requires_grad_(False)
    for part in wanted.values():
        _adapt(part)
    for each, target in targets.items():
        part, dropout = wanted[each], adapter.config.lora_dropout
        low = LowRank(adapter.weights[each], target.scaling, dropout, device=_device(part))
        part.lora[name] = low.train(part.training)
    for each, array in adapter.saved.items():
        part, attribute = wanted[each], each.rpartition(".")[2]
        if name not in part.saved:
            part.saved[name] = _copy(part)
        setattr(part.saved[name], attribute, nn.Parameter(from_numpy(array.copy()).to(_device(part)).float()))
    configs[name] = adapter.config
    for part in _parts(model):
        part.active = (name,)
    for other, low in _lows(model):
        low.requires_grad_(other == name and trains)
    return model


def _adapt(part: nn.Module) -> None:
    if isinstance(part, Adapted):
        return
    part.__class__ = _KINDS[type(part)]
    part.lora, part.saved = nn.ModuleDict(), nn.ModuleDict()
    part.active = part.merged = ()


def _copy(part: nn.Module) -> nn.Module:
    """A part of the same kind without adapters, which an adapter has of its own."""
    if isinstance(part, nn.Embedding):
        return nn.Embedding.from_pretrained(torch.empty(part.weight.shape, device="meta"), freeze=False)
    rows, columns = part.weight.shape
    kind = Head if isinstance(part, Head) else nn.Linear
    return kind(columns, rows, bias=part.bias is not None, device="meta")


def _device(part: nn.Module) -> torch.device:
    return next(x.device for x in (*part.parameters(recurse=False), *part.buffers(recurse=False)))


def _lows(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of an adapter, what it has of one part) of all parts."""
    return (pair for part in _parts(model) for pair in (*part.lora.items(), *part.saved.items()))


def _parts(model: nn.Module) -> Iterator[Any]:
    return (part for _, part in _named_parts(model))


def _named_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Adapted))


def _config(model: nn.Module, name: str) -> LoraConfig:
    return models.named(name, model.__dict__.get("peft_configs", {}))


def _refuse_merging(model: Any, name: str, part: Any) -> None:
    is_packed, is_embedding = isinstance(part, QuantizedLinear), isinstance(part, nn.Embedding)
    models.refuse_merging(model, name, part, is_packed=is_packed, is_embedding=is_embedding)
