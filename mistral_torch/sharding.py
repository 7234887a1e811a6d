"""A finished model over a mesh of processes: a guest of which layers.py and model.py know nothing.

Over the axis `tensor` matrices are cut as Megatron cuts them (arXiv 1909.08053), by the rules of
`mistral_core.sharding`: every process computes with its own heads, its part of the MLP and of the vocabulary, and one
sum follows attention and one the MLP. Over `fsdp` and `data` torch's own FSDP2 gathers what a layer needs. All
parameters are DTensors, so that optimizers, clipping and checkpoints of torch's know what they are parts of.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from mistral_core import MistralConfig
from mistral_core.errors import MeshError, UnsupportedFeatureError
from mistral_core.parameters import Parameter, parameters
from mistral_core.quantization.matrix import PackedMatrix, part_of, whole_of
from mistral_core.sharding import Sharding

from .arrays import to_numpy
from .layers import MLP, Attention, Head, RMSNorm, rms_norm
from .processes import device_of
from .products import product
from .quantize import QuantizedLinear, put

Model = TypeVar("Model", bound=nn.Module)

AXES = ("data", "fsdp", "tensor")
"""What the axes of a mesh may be called, in this order: copies, copies cut by FSDP2, parts of every layer."""


@dataclass(frozen=True)
class Placement:
    """A mesh of processes, and which part of a model of a config this one holds."""

    mesh: DeviceMesh
    config: MistralConfig
    sharding: Sharding
    """How layers are cut over the axis `tensor`."""

    @classmethod
    def of(cls, config: MistralConfig, mesh: DeviceMesh) -> Placement:
        """The placement, checked; raises MeshError for a mesh that does not fit."""
        names = mesh.mesh_dim_names or ()
        if not names or [name for name in AXES if name in names] != list(names):
            raise MeshError(
                f"mesh must have axes named {', '.join(AXES)}, some of them and in this order, got "
                f"{', '.join(names) or 'no names'}; make it with torch.distributed.init_device_mesh(kind, sizes, "
                "mesh_dim_names=...)."
            )
        if "data" in names and "fsdp" not in names:
            raise MeshError(
                f"mesh: beside an axis data there must be one fsdp, got {', '.join(names)}; call it fsdp, or add fsdp "
                "of size 1 where every process is to hold a whole copy."
            )
        return cls(mesh, config, Sharding.of(config, {"tensor": mesh["tensor"].size() if "tensor" in names else 1}))

    @functools.cached_property
    def tensor(self) -> DeviceMesh | None:
        """The processes among which this one's copy of every layer is cut."""
        return self.mesh["tensor"] if "tensor" in (self.mesh.mesh_dim_names or ()) else None

    @functools.cached_property
    def copies(self) -> DeviceMesh | None:
        """The processes that compute other rows of a batch, as FSDP2 takes them."""
        names = tuple(name for name in self.mesh.mesh_dim_names or () if name != "tensor")
        return self.mesh[names] if names else None

    @functools.cached_property
    def config_here(self) -> MistralConfig:
        """The config of the part of the model that is here: fewer heads."""
        parts, config = self.sharding.parts("N"), self.config
        return config.replace(
            num_attention_heads=config.num_attention_heads // parts,
            num_key_value_heads=max(1, config.num_key_value_heads // parts),
            head_dim=config.head_dim,
        )

    def placements(self, row: Parameter) -> tuple[Replicate | Shard, ...]:
        """How a parameter is cut over the axis `tensor`, in torch's words."""
        cut = [axis for axis, names in enumerate(self.sharding.parameter(row)) if names]
        return (Shard(cut[0]) if cut else Replicate(),)

    def part(self, row: Parameter, rank: int | None = None) -> tuple[slice, ...]:
        """Which slice of each axis of a parameter is computed with, here or in the process of this rank of `tensor`.

        Of key/value heads that several processes repeat it is one, though every process holds all of them as floats.
        """
        if self.tensor is None:
            return self.sharding.part(row, {})
        return self.sharding.part(row, {"tensor": self.tensor.get_local_rank() if rank is None else rank})

    def check_packed(self, name: str) -> None:
        """Raise UnsupportedFeatureError where a packed matrix would be whole in every process."""
        if self.copies is not None and self.copies.size() > 1:
            raise UnsupportedFeatureError(
                f"{name}: FSDP2 cuts floats alone, and packed matrices would be whole in every process; cut them over "
                "the axis tensor alone, or load the floats."
            )

    def packed(self, name: str, matrix: PackedMatrix, *, is_head: bool, device: Any) -> QuantizedLinear:
        """The part of a packed matrix that is computed with here, as a part of the model."""
        self.check_packed(name)
        row = dict(parameters(self.config))[name]
        here, size = (0, 1) if self.tensor is None else (self.tensor.get_local_rank(), self.tensor.size())
        # of all processes: where one could not, none goes on alone
        parts = [part_of(matrix, self.part(row, rank), name) for rank in range(size)]
        found = ShardedQuantizedLinear(parts[here], is_head=is_head, device=device)
        found.placement, found.row, found.whole = self, row, (matrix.shape, matrix.block)
        found.cut = self.placements(row)[0]
        return found


def parallelize(model: Model, mesh: DeviceMesh, **options: Any) -> Model:
    """Cut a finished model over a mesh of processes, in place, and return it.

    The mesh's axes are called data, fsdp and tensor; all processes call this, with the same model. Over `tensor` the
    values are those of its first process. `options` are those of torch's `fully_shard` (mp_policy, offload_policy,
    reshard_after_forward), which is applied to each layer and to the model where there is an axis fsdp.
    Raises MeshError, with the sizes that would fit, and UnsupportedFeatureError for a model with parts of other kinds.
    """
    placement = Placement.of(model.config.value, mesh)
    _check(model, placement)
    model.base_model.placement = placement
    if placement.tensor is not None:
        _cut(model, placement)
    if placement.copies is not None:
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=placement.copies, **options)
        fully_shard(model, mesh=placement.copies, **options)
    return model


def _check(model: nn.Module, placement: Placement) -> None:
    """Raise what `parallelize` raises of a model's parts, before any of them is changed."""
    for name, _ in model.packed_parts():
        placement.check_packed(name)
    for name, module in model.named_modules() if placement.tensor is not None else ():
        if type(module) not in _KINDS and any(True for _ in module.parameters(recurse=False)):
            raise UnsupportedFeatureError(
                f"parallelize: {name} must be a module that models here are made of, got {type(module).__name__}; "
                "parallelize the model before anything wraps its parts."
            )


def _cut(model: nn.Module, placement: Placement) -> None:
    mesh = placement.tensor
    assert mesh is not None
    for module in model.modules():
        if type(module) in _KINDS and not isinstance(module, QuantizedLinear):
            module.__class__ = _KINDS[type(module)]
            module.tensor = mesh
    packed = dict(model.packed_parts())
    for name, row in parameters(model.config.value, model.architecture):
        module, attribute = model._module(name), name.rpartition(".")[2]
        if name in packed:
            put(model, name, packed[name].matrix, device=packed[name].weight_packed.device)
            model._module(name).activations = packed[name].activations
            continue
        old, cut = getattr(module, attribute), placement.placements(row)
        new = nn.Parameter(distribute_tensor(old.detach(), mesh, cut), requires_grad=old.requires_grad)
        setattr(module, attribute, new)
        if "K" in row.axes[0] and cut == (Replicate(),):
            module.rows = placement.part(row)[0]
    model.tie_weights()


def average(number: Any, mesh: DeviceMesh | None = None) -> Tensor:
    """The mean of a number over the processes of a mesh that compute other rows; without one, over all processes.

    Of the labels that count in this process's batches of a step it is what `num_items_in_batch` has to be, where
    gradients are averaged over processes, as FSDP2 and DistributedDataParallel do: then a step is the same however its
    rows were split, and the mean of the losses is that of the whole step.
    """
    found = torch.as_tensor(number).detach().double()
    groups: list[Any] = [None]
    if mesh is not None:
        found = found.to(device_of(mesh))
        groups = [mesh.get_group(name) for name in mesh.mesh_dim_names or () if name != "tensor"]
    for group in groups:
        torch.distributed.all_reduce(found, group=group)
        found = found / torch.distributed.get_world_size(group)
    return found.float()


# Parts that compute with what is here of their parameters


def _local(parameter: Tensor | None) -> Tensor | None:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _entered(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same x, whose gradient is the sum of those of all processes."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return DTensor.from_local(x, mesh, (Replicate(),), run_check=False).to_local(grad_placements=(Partial(),))


def _summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the parts that all processes have."""
    return _redistributed(x, mesh, Partial())


def _joined(x: Tensor, mesh: DeviceMesh, *, axis: int = -1) -> Tensor:
    """The parts that all processes have, beside each other along an axis."""
    if mesh.size() == 1:
        return x
    axis %= x.ndim
    # copied once, where they are put beside each other: FSDP2 warns of outputs that are views
    return _redistributed(x[None], mesh, Shard(0)).movedim(0, axis).flatten(axis, axis + 1)


def _redistributed(x: Tensor, mesh: DeviceMesh, was: Partial | Shard) -> Tensor:
    return DTensor.from_local(x, mesh, (was,), run_check=False).redistribute(placements=(Replicate(),)).to_local()


class ShardedNorm(RMSNorm):
    """A norm whose weight every process has."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, _local(self.weight), self.eps)


class ShardedEmbedding(nn.Embedding):
    """The embeddings of this process's part of the vocabulary, summed."""

    tensor: DeviceMesh

    def forward(self, ids: Tensor) -> Tensor:
        here = _local(self.weight)
        ids = ids - self.tensor.get_local_rank() * len(here)
        is_here = (ids >= 0) & (ids < len(here))
        return _summed(F.embedding(torch.where(is_here, ids, 0), here) * is_here[..., None], self.tensor)


class ShardedLinear(nn.Linear):
    """x W^T with this process's rows of W; with its columns, the sum over all processes."""

    tensor: DeviceMesh
    rows: slice | None = None
    """Of a W that every process has, the rows that this one computes with."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.rows is not None:
            whole = weight.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
            return F.linear(x, whole[self.rows])
        y = F.linear(x, weight.to_local())
        return _summed(y, self.tensor) if weight.placements == (Shard(1),) else y


class ShardedHead(Head):
    """A head with this process's rows of its matrix, or all of them; all scores are there in every process."""

    tensor: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.placements == (Replicate(),):
            return product(x, _local(self.weight), _local(self.bias), dtype=torch.float32)
        return _joined(product(_entered(x, self.tensor), _local(self.weight), dtype=torch.float32), self.tensor)


class ShardedQuantizedLinear(QuantizedLinear):
    """The product with this process's part of a packed matrix."""

    placement: Placement
    row: Parameter
    whole: tuple[tuple[int, int], tuple[int, int]]
    """Shape [O, I] and block of the whole matrix."""
    cut: Replicate | Shard

    def forward(self, x: Tensor) -> Tensor:
        mesh = self.placement.tensor
        if mesh is None:
            return super().forward(x)
        y = super().forward(_entered(x, mesh) if self.is_head else x)
        if self.cut == Shard(1):
            return _summed(y, mesh)
        return _joined(y, mesh) if self.is_head else y

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of the whole matrix."""
        return self.whole[0]

    @property
    def matrix(self) -> PackedMatrix:
        """The whole matrix in NumPy, which all processes ask for."""
        mesh, here = self.placement.tensor, super().matrix
        if mesh is None:
            return here
        codes, scale, zero = (
            [None] * mesh.size() if x is None else _of_all(x, mesh)
            for x in (self.weight_packed, self.weight_scale, self.weight_zero_point)
        )
        parts = [
            (self.placement.part(self.row, rank), here._replace(codes=codes[rank], scale=scale[rank], zero=zero[rank]))
            for rank in range(mesh.size())
        ]
        return whole_of(parts, *self.whole)


def _of_all(x: Tensor, mesh: DeviceMesh) -> list[np.ndarray]:
    """What each process has in the place of an array, in NumPy."""
    found = [torch.empty_like(x) for _ in range(mesh.size())]
    torch.distributed.all_gather(found, x.contiguous(), group=mesh.get_group())
    return [to_numpy(each) for each in found]


class ShardedAttention(Attention):
    """Attention with this process's heads."""

    tensor: DeviceMesh

    def forward(self, x_BTD: Tensor, *others: Any, **options: Any) -> Any:
        h, weights, kept = super().forward(_entered(x_BTD, self.tensor), *others, **options)
        return h, None if weights is None else _joined(weights, self.tensor, axis=1), kept


class ShardedMLP(MLP):
    """The MLP with this process's part of F."""

    tensor: DeviceMesh

    def forward(self, x_BTD: Tensor) -> Tensor:
        return super().forward(_entered(x_BTD, self.tensor))


_KINDS: Mapping[type[nn.Module], type[nn.Module]] = {
    RMSNorm: ShardedNorm, nn.Embedding: ShardedEmbedding, nn.Linear: ShardedLinear, Head: ShardedHead,
    QuantizedLinear: ShardedQuantizedLinear, Attention: ShardedAttention, MLP: ShardedMLP,
}  # fmt: skip
"""Classes of parts -> the class of the same part cut over the axis `tensor`."""
