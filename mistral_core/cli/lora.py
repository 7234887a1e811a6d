"""`mistral lora info|merge|gguf|diff ...`: LoRA adapters in peft's files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnknownArgumentError
from ..lora import gguf
from ..lora.adapter import PREFIX, WEIGHTS_FILE, read_config
from ..weights.containers.safetensors import SafetensorsFile
from ..weights.convert import convert
from ..weights.difference import compared
from . import put
from .convert import bar

ACTIONS = {
    "info": ("ADAPTER", "what it adapts, of which rank, and how many numbers that are"),
    "merge": ("BASE ADAPTER DST", "write the base with the adapter folded in"),
    "gguf": ("BASE ADAPTER DST", f"write the adapter for llama.cpp, as {gguf.FILE} in a directory"),
    "diff": ("ADAPTER ADAPTER", "how far the tensors of one are from those of another; status 1 where any is"),
}


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    told = "; ".join(f"{name} {paths}: {what}" for name, (paths, what) in ACTIONS.items())
    command.add_argument("action", choices=list(ACTIONS), help=told)
    command.add_argument("path", nargs="+", help="as the action has them; the base may be a hub id")
    command.add_argument("--dtype", help="merge: of what is written; default: as stored")
    command.add_argument("--allow-lossy", action="store_true", help="merge: into a packed base, as floats")
    command.add_argument("--overwrite", action="store_true", help="merge, gguf: replace the destination")
    command.add_argument("--revision", help="merge, gguf: branch, tag or commit of a hub id")


def run(options: argparse.Namespace) -> int:
    """Do what the action says."""
    expected = ACTIONS[options.action][0]
    if len(options.path) != len(expected.split()):
        raise UnknownArgumentError(f"lora {options.action}: give {expected}, got {len(options.path)} paths.")
    return int({"info": _info, "merge": _merge, "gguf": _gguf, "diff": _diff}[options.action](options))


def _info(options: argparse.Namespace) -> int:
    (path,) = map(Path, options.path)
    lora, file = read_config(path), SafetensorsFile(path / WEIGHTS_FILE)
    numbers = sum(int(np.prod(info.shape)) for info in file.tensors.values())
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules or ())
    facts: dict[str, Any] = {
        "base": lora.base_model_name_or_path,
        "task": lora.task_type,
        "kind": ("DoRA" if lora.use_dora else "LoRA") + (", rank-stabilized" if lora.use_rslora else ""),
        "r": lora.r,
        "alpha": lora.lora_alpha,
        "targets": targets,
        "other ranks": dict(lora.rank_pattern) or None,
        "other alphas": dict(lora.alpha_pattern) or None,
        "saved whole": ", ".join(lora.modules_to_save or ()) or None,
        "tensors": len(file.tensors),
        "numbers": numbers,
    }
    if options.json:
        put(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        if value is not None:
            put(f"{name:13}{f'{value:,}' if name == 'numbers' else value}")
    return 0


def _merge(options: argparse.Namespace) -> int:
    base, adapter, destination = options.path
    with bar(quiet=options.json) as progress:
        report = convert(
            base, destination, to="hf", adapter=adapter, dtype=options.dtype, overwrite=options.overwrite,
            allow_lossy=options.allow_lossy, progress=progress, revision=options.revision,
        )  # fmt: skip
    put(json.dumps({"destination": report.destination, "moves": report.moves}) if options.json else report)
    return 0


def _gguf(options: argparse.Namespace) -> int:
    base, adapter, destination = options.path
    path = gguf.write(base, adapter, destination, overwrite=options.overwrite, revision=options.revision)
    put(json.dumps({"path": str(path)}) if options.json else f"written: {path}, to be loaded beside the base's GGUF")
    return 0


def _diff(options: argparse.Namespace) -> int:
    files = [SafetensorsFile(Path(path) / WEIGHTS_FILE) for path in options.path]
    one, other = ({name.removeprefix(PREFIX): name for name in file.tensors} for file in files)
    configs = [read_config(Path(path)).to_dict() for path in options.path]
    fields = sorted(name for name in configs[0] if configs[0][name] != configs[1][name])
    lines = [f"{name}: {configs[0][name]} and {configs[1][name]}" for name in fields]
    furthest = 0.0
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            lines.append(f"{name}: only in the {'second' if name in other else 'first'}")
            continue
        found = compared(name, files[0].read(one[name]), files[1].read(other[name]))
        furthest = max(furthest, found.max_abs)
        if found.what or found.changed:
            lines.append(f"{name}: {found.what or f'{found.max_abs:.3g} apart'}")
    if options.json:
        put(json.dumps({"differences": lines, "furthest": furthest}, indent=1))
    else:
        put("\n".join(lines) or "the same")
    return int(bool(lines))
