"""`mistral plan PATH`: what a model needs on devices that are not here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import MistralConfig
from ..config.presets import PRESETS
from ..errors import ConfigError
from ..parameters import HEADS
from ..plan import DEVICES, Collective, Plan, fits, memory_of, mesh_of, plan, suggest
from ..plan.devices import GB, MOST, RESERVE
from ..plan.memory import ESTIMATED
from ..plan.workload import DTYPES, OPTIMIZERS, SPELLINGS
from ..quantization.request import SCHEMES, Quantization
from ..weights.opening import Checkpoint
from . import progress, put

SHOWN = ("h100", "tpu-v5e", "rtx4090")
"""Devices that are looked at where none is named: of 80, 16 and 24 GB."""
RANK = 16
SEQUENCE = 4096


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="the name of a published size, a checkpoint directory, or a hub id")
    command.add_argument("--mesh", help="devices by axis: data=4,tensor=8; default: one device")
    command.add_argument(
        "--dtype", help=f"{', '.join((*DTYPES, *SPELLINGS))}; default: the config's own, or else bfloat16"
    )
    command.add_argument("--batch", type=int, default=1, help="rows of all devices together; default: 1")
    command.add_argument(
        "--seq", type=int, help=f"tokens of a row; default: {SEQUENCE}, or what the model was made for if that is less"
    )
    command.add_argument(
        "--optimizer", choices=tuple(OPTIMIZERS), default="none", help="none is inference; default: none"
    )
    command.add_argument(
        "--master", help="float32: master weights and moments in float32; default: moments have the parameters' dtype"
    )
    command.add_argument(
        "--lora", type=int, nargs="?", const=RANK, metavar="RANK",
        help=f"adapters beside all matrices of the layers, which alone train; a rank, default: {RANK}",
    )  # fmt: skip
    command.add_argument("--quantization", choices=SCHEMES, help="how the matrices of the layers are packed")
    command.add_argument("--group-size", type=int, help="columns that share a scale; default: the scheme's own")
    command.add_argument("--remat", action="store_true", help="each layer is computed again for its gradients")
    command.add_argument("--cache-dtype", help="of keys and values, int8 too; default: that of the parameters")
    command.add_argument(
        "--device", action="append",
        help=f"a size such as 80GB, or {', '.join(DEVICES)}; may be repeated; default: {', '.join(SHOWN)}",
    )  # fmt: skip
    command.add_argument("--suggest", action="store_true", help="find the smallest mesh on which everything fits")


def run(options: argparse.Namespace) -> int:
    """Print bytes and collectives of a device, or a mesh for each device; 1 where a device named is too small."""
    devices = {name: memory_of(name) for name in options.device or SHOWN}
    config = _config(options)
    asked = _asked(options, config)
    if options.suggest:
        if options.mesh is not None:
            raise ConfigError(f"--suggest finds a mesh and must stand without --mesh, got {options.mesh}; leave one.")
        found = {name: suggest(config, memory, **asked) for name, memory in devices.items()}
        _put_suggested(found, devices, as_json=options.json)
        fitting = [planned is not None for planned in found.values()]
    else:
        planned = plan(config, mesh_of(options.mesh or ""), **asked)
        fitting = [fits(planned, memory) for memory in devices.values()]
        _put_plan(options.path, planned, devices, as_json=options.json)
    return int(options.device is not None and not all(fitting))


def _config(options: argparse.Namespace) -> MistralConfig:
    """The config of a published size, of a checkpoint of any format, or of a hub id, whose weights stay there."""
    path = options.path
    if path in PRESETS:
        return PRESETS[path]
    if not Path(path).exists():
        return MistralConfig.from_pretrained(path)
    checkpoint = Checkpoint.open(path)
    if checkpoint.schemes and options.quantization is None:
        progress(
            f"{path} is packed as {', '.join(checkpoint.schemes)}; planned are floats, unless --quantization is given"
        )
    return checkpoint.config


def _asked(options: argparse.Namespace, config: MistralConfig) -> dict[str, Any]:
    """The arguments of `plan` but config and mesh."""
    architecture = (config.architectures or ("MistralForCausalLM",))[0]
    if architecture not in HEADS:
        raise ConfigError(f"architectures must be one of {', '.join(HEADS)}, got {architecture!r}; correct the config.")
    if options.group_size is not None and options.quantization is None:
        raise ConfigError(f"--group-size must stand beside --quantization, got {options.group_size} alone; give both.")
    packed = None if options.quantization is None else Quantization(options.quantization, options.group_size)
    return {
        "architecture": architecture,
        "dtype": options.dtype or config.dtype or "bfloat16",
        "batch": options.batch,
        "sequence": min(SEQUENCE, config.max_position_embeddings) if options.seq is None else options.seq,
        "optimizer": options.optimizer,
        "master": options.master,
        "lora": options.lora,
        "quantization": packed,
        "remat": options.remat,
        "cache_dtype": options.cache_dtype,
    }


def _put_plan(path: str, planned: Plan, devices: Mapping[str, int], *, as_json: bool) -> None:
    if as_json:
        told = {name: {"bytes": memory, "fits": fits(planned, memory)} for name, memory in devices.items()}
        put(
            json.dumps({**_facts(planned), "collectives": list(map(_row, planned.collectives)), "fits": told}, indent=1)
        )
        return
    for line in _lines(path, planned):
        put(line)
    for name, memory in devices.items():
        answer = "fits" if fits(planned, memory) else "does not fit"
        put(f"{answer} on {_device(name, memory)}")


def _facts(planned: Plan) -> dict[str, Any]:
    return {
        "mesh": dict(planned.mesh), "devices": planned.devices, "bytes": planned.bytes, "total": planned.total,
        "estimated": list(ESTIMATED),
    }  # fmt: skip


def _row(found: Collective) -> dict[str, Any]:
    return {
        "kind": found.kind, "what": found.what, "phase": found.phase, "axes": list(found.axes),
        "devices": found.devices, "count": found.count, "bytes": found.nbytes, "sent": found.sent,
    }  # fmt: skip


def _lines(path: str, planned: Plan) -> Iterator[str]:
    """What is planned, bytes by kind, and the collectives."""
    yield f"{path} on {_where(planned)}: {_work(planned)}"
    work = planned.workload
    if work.rows == work.batch and work.axes("B"):
        yield f"{' x '.join(work.axes('B'))} does not divide the batch, so every device computes all of it"
    yield ""
    for kind, size in planned.bytes.items():
        if size:
            yield f"{kind:12}{size:>20,} bytes of a device{', an estimate' if kind in ESTIMATED else ''}"
    yield f"{'in all':12}{planned.total:>20,} bytes, {_size(planned.total)}"
    yield ""
    if planned.collectives:
        yield from _table(planned.collectives)
        yield ""


def _table(found: tuple[Collective, ...]) -> Iterator[str]:
    """The collectives, phase by phase, and what a device sends in all."""
    wide = max(len(_named(each)) for each in found)
    axes = max(len(",".join(each.axes)) for each in found)
    for phase in dict.fromkeys(each.phase for each in found):
        rows = [each for each in found if each.phase == phase]
        yield f"{phase}: each device sends {sum(each.sent for each in rows):,} bytes"
        for each in rows:
            yield f"  {_named(each):{wide}}  {','.join(each.axes):{axes}}{each.count:>6} x {each.nbytes:>14,}"


def _named(found: Collective) -> str:
    return f"{found.kind} of {found.what}"


def _put_suggested(found: Mapping[str, Plan | None], devices: Mapping[str, int], *, as_json: bool) -> None:
    if as_json:
        put(json.dumps({name: None if each is None else _facts(each) for name, each in found.items()}, indent=1))
        return
    for name, planned in found.items():
        if planned is None:
            put(f"{_device(name, devices[name])}: nothing up to {MOST} devices; try --remat, --lora or a shorter --seq")
        else:
            put(f"{_device(name, devices[name])}: {_where(planned)}; {_size(planned.total)} each")


def _where(planned: Plan) -> str:
    if planned.devices == 1:
        return "one device"
    return f"{','.join(f'{axis}={size}' for axis, size in planned.mesh.items())}, {planned.devices} devices"


def _work(planned: Plan) -> str:
    work = planned.workload
    return ", ".join([
        work.dtype, f"training with {work.optimizer}" if work.trains else "inference",
        f"{work.batch} x {work.sequence:,} tokens",
        *([f"master weights in {work.master}"] if work.master else []),
        *([f"adapters of rank {work.lora}"] if work.lora else []),
        *([f"packed as {work.quantization.scheme}"] if work.quantization else []),
        *(["layers computed again"] if work.remat else []),
        *([f"cache in {work.cache_dtype}"] if work.cache_dtype != work.dtype else []),
    ])  # fmt: skip


def _device(name: str, memory: int) -> str:
    named = f"{name.lower()} ({_size(memory)})" if name.lower() in DEVICES else _size(memory)
    return f"{named}, {RESERVE} % kept free"


def _size(size: int) -> str:
    unit, name = (GB, "GB") if size >= GB else (10**6, "MB")
    return f"{size / unit:,.2f}".rstrip("0").rstrip(".") + f" {name}"
