"""Tensors and models that several processes hold parts of, whoever has cut them: torch's own functions or `sharding`.

Nothing here loads what torch has for it: where that is not loaded, nothing is cut.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_cut(array: Any) -> bool:
    """Whether a tensor is cut over processes: a DTensor, which nobody has who did not load torch.distributed."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(array, tensors.DTensor)


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 cuts a module's parameters, and gathers them when it is called."""
    sharded = sys.modules.get("torch.distributed.fsdp")
    return sharded is not None and isinstance(module, sharded.FSDPModule)


def joined(array: Any) -> Tensor:
    """All of a tensor that is cut over processes, all of which call this."""
    from torch.distributed.tensor import Replicate

    placements = list(array.placements)
    for axis in range(len(placements)):  # one after another: torch warns of more at once, and does the same
        placements[axis] = Replicate()
        array = array.redistribute(placements=placements)
    return array.to_local()


def index_of(parameter: DTensor) -> tuple[slice, ...]:
    """Which slice of each axis of a parameter this process holds; torch says so, however it was cut."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def device_of(mesh: DeviceMesh) -> torch.device:
    """The device of this process."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


@dataclass(frozen=True)
class Together:
    """The processes that hold parts of one model: what one of them knows and all need."""

    mesh: DeviceMesh

    @classmethod
    def of(cls, model: nn.Module) -> Together | None:
        """Those of a model that `parallelize` or torch's own functions have cut; None of one that is whole here."""
        placement = model.base_model.placement
        if placement is not None:
            return cls(placement.mesh)
        for module in model.modules():
            if is_fsdp(module):  # what it has gathered for a call does not say of which processes
                module.reshard()
        meshes = [p.device_mesh for p in model.parameters() if is_cut(p)]
        return cls(max(meshes, key=lambda mesh: mesh.ndim)) if meshes else None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files, and whose seed is taken."""
        return not any(self.mesh.get_coordinate())

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process; all wait here for all."""
        return self._any(flag, range(self.mesh.ndim))

    def stops(self, here: bool) -> bool:
        """Whether the decoding stops in a process that computes the same rows."""
        names = self.mesh.mesh_dim_names or ()
        return self._any(here, [axis for axis, name in enumerate(names) if name == "tensor"])

    def of_first(self, number: Tensor) -> Tensor:
        """What the first process has in the place of an integer."""
        number = (number if self.is_first else torch.zeros_like(number)).to(device_of(self.mesh))
        for axis in range(self.mesh.ndim):
            torch.distributed.all_reduce(number, group=self.mesh.get_group(axis))
        return number

    def _any(self, flag: bool, axes: Iterable[int]) -> bool:
        found = torch.tensor(int(flag), device=device_of(self.mesh))
        for axis in axes:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.mesh.get_group(axis))
        return bool(found)


@contextlib.contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """A context in which a model that FSDP2 cuts is called as often in every process; others it leaves alone.

    A call gathers what each layer needs, and waits for all processes to do so. So each tells the others before a call
    that it makes one, and whoever has no more of its own joins in the calls of the others, with a token of no meaning.
    """
    together = Together.of(model) if is_fsdp(model) else None
    if together is None:
        yield
        return
    telling = model.register_forward_pre_hook(lambda *_: together.any(True) and None)
    try:
        yield
    finally:
        telling.remove()
        with torch.no_grad():
            while together.any(False):
                model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False, logits_to_keep=1)
