"""PyTorch's own files (pytorch_model.bin, consolidated.00.pth): what they say is checked first, numbers come after.

A pickle may run code. Here it is looked through before anything reads it, may name nothing but dense float tensors,
and then goes to `torch.load(weights_only=True)` without the numbers: those are read where they lie, like all others.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mistral_core import MistralConfig
from mistral_core.disk import limits, reading
from mistral_core.errors import CorruptCheckpointError, LimitExceededError, UnsafeFileError, UnsupportedFeatureError
from mistral_core.parameters import BASE_PREFIX
from mistral_core.weights import layouts
from mistral_core.weights.containers import tensor_file
from mistral_core.weights.containers.shards import Family, Specs
from mistral_core.weights.containers.stored_zip import Member, StoredZip
from mistral_core.weights.containers.tensor_file import (
    CODES,
    MAX_RANK,
    MAX_TENSORS,
    UNSEEN,
    Seen,
    TensorFile,
    TensorInfo,
    opened,
    quoted,
)
from mistral_core.weights.contents import Contents
from mistral_core.weights.formats import sharded
from mistral_core.weights.formats.base import Outline, Target
from mistral_core.weights.formats.sharded import Sharded

from .arrays import DTYPES

_CODES = {torch_dtype: code for name, torch_dtype in DTYPES.items() for d, code in CODES.items() if d.name == name}
_STORAGES = {f"{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")}
_NEEDED = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(f"torch {storage}" for storage in _STORAGES),
}
"""All that a state dict of dense floats asks of a pickle."""
_PUT_INTO = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_OTHER_PARTS = re.compile(r"consolidated\.(?!00)[0-9]+\.pth")
_MEMBERS = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+"
)


class PickledFile(TensorFile):
    """A state dict in a zip, as torch.save writes it since 1.6."""

    def __init__(self, path: Path) -> None:
        """Check the zip and the pickle in it; no number is read.

        Raises UnsafeFileError, UnsupportedFeatureError, CorruptCheckpointError and its kinds, LimitExceededError.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        first = tensor_file.first_bytes(self.path)
        if not first.startswith(b"PK"):
            _refuse_without_zip(self.path, first)
        with opened(self.path) as descriptor:
            self.stamp = tensor_file.stamp_of(descriptor)
            archive = StoredZip(self.path, descriptor, _MEMBERS, MAX_TENSORS + 10)
            state = archive.read("data.pkl", limits.PICKLE_BYTES)
            if "byteorder" in archive.members and archive.read("byteorder", 16) != b"little":
                raise UnsupportedFeatureError(f"{self.path}: not little-endian; re-save it as safetensors.")
        _check_names(self.path, state)
        storages = {name: member for name, member in archive.members.items() if name.startswith("data/")}
        tensors, places = _without_numbers(self.path, state, storages)
        self.tensors = {name: _tensor_info(self.path, name, value, places) for name, value in tensors.items()}
        _check_overlaps(self.path, self.tensors.values())


def _refuse_without_zip(path: Path, first: bytes) -> NoReturn:
    with opened(path) as descriptor:
        tar = os.pread(descriptor, 5, 257) == b"ustar"
    if tar or first[:1] == b"\x80":
        raise UnsupportedFeatureError(f"{path}: the format of PyTorch before 1.6; re-save it as safetensors.")
    raise CorruptCheckpointError(f"{path}: no file of torch.save: it begins {first[:60]!a}.")


# The pickle


def _check_names(path: Path, state: bytes) -> None:
    """Refuse a pickle that asks for anything but dense float tensors; nothing is run to find out."""
    try:
        _check_depth(path, state)
        for opcode, argument, _ in pickletools.genops(state):
            if opcode.name == "GLOBAL" and argument in _NEEDED:
                continue
            if opcode.name in ("GLOBAL", "INST") or opcode.code in "\x93oP\x81\x92\x82\x83\x84":
                asked = quoted(str(argument or opcode.name).replace(" ", "."))
                raise UnsafeFileError(
                    f"{path}: the pickle asks for {asked}, which dense float tensors do not need; nothing of it was "
                    "run. Take the weights as safetensors from someone you trust."
                )
    except (ValueError, LookupError, OverflowError) as cause:
        raise CorruptCheckpointError(f"{path}: data.pkl is no pickle ({cause}); copy it again.") from cause


def _check_depth(path: Path, state: bytes) -> None:
    """Refuse a pickle whose containers are nested deep: hashing or printing one overflows the C stack.

    The pickle is run on depths in the place of values: what is made of others is one deeper than the deepest of them.
    That is exact for tuples, which are made of what is there; what a list or dict gets later, no hash looks into.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(state)):
        limits.check(count, limits.PICKLE_OPS, what="steps of a pickle", where=str(path))
        if opcode.name == "MARK":
            stack.append(None)
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1] or 0
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        else:
            depth = _taken(opcode, stack)
            limits.check(depth, limits.PICKLE_DEPTH, what="containers within one another", where=str(path))
            for _ in opcode.stack_after:
                stack.append(depth)


def _taken(opcode: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """Take what an opcode takes from a stack of depths; how deep is what it leaves.

    Raises IndexError where the stack has too little.
    """
    taken: list[int] = []  # the container that others are put into is the last
    wanted = [each.name for each in opcode.stack_before]
    if "mark" in wanted:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        wanted = wanted[: wanted.index("mark")]
    for _ in wanted:
        taken.append(stack.pop() or 0)
    if opcode.name in _PUT_INTO:
        return max([taken[-1], *(depth + 1 for depth in taken[:-1])])
    made = opcode.name not in ("POP", "POP_MARK", "STOP", "DUP")
    return max(taken, default=-1) + 1 if made else max(taken, default=0)


def _without_numbers(
    path: Path, state: bytes, storages: Mapping[str, Member]
) -> tuple[dict[str, Tensor], dict[int, Member]]:
    """What torch makes of a pickle whose storages are empty, and which storage is meant by the places it then tells."""
    hollow = io.BytesIO()
    with zipfile.ZipFile(hollow, "w") as archive:
        for name, content in {"data.pkl": state, "version": b"3\n", **dict.fromkeys(storages, b"")}.items():
            archive.writestr(f"x/{name}", content)
        begins = {entry.header_offset + 30 + len(entry.filename): entry.filename[2:] for entry in archive.infolist()}
    hollow.seek(0)
    try:
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")
            found: Any = torch.load(hollow, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise UnsafeFileError(f"{path}: torch refuses the pickle ({_first_line(cause)}).") from cause
    except Exception as cause:  # a broken pickle fails in as many ways as there are bytes
        raise CorruptCheckpointError(f"{path}: data.pkl is broken ({_first_line(cause)}); copy it again.") from cause
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UnsafeFileError(f"{path} must hold a state dict, names to tensors, got {type(found).__name__}.")
    if len(found) > MAX_TENSORS:
        raise LimitExceededError(f"{path}: {len(found)} tensors; at most {MAX_TENSORS} are read.")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise UnsafeFileError(f"{path}: {quoted(name)} is {type(value).__name__}; save the state dict itself.")
    return found, {place: storages[name] for place, name in begins.items() if name in storages}


def _first_line(cause: Exception) -> str:
    return ascii(f"{type(cause).__name__}: {cause}".partition("\n")[0][:200])


def _tensor_info(path: Path, name: str, value: Tensor, places: Mapping[int, Member]) -> TensorInfo:
    """Where one tensor lies: whole rows one after the other, within its storage."""
    where = f"{path}: {quoted(name)}"
    if value.ndim > MAX_RANK:
        raise LimitExceededError(f"{where}: {value.ndim} dimensions; at most {MAX_RANK} are read.")
    storage = value.untyped_storage()
    code, member = _CODES.get(value.dtype), places.get(getattr(storage, "_checkpoint_offset", -1))
    if code is None or member is None or storage.nbytes() != member.size:
        raise UnsafeFileError(f"{where}: {value.dtype} in a storage of another size; re-save it as safetensors.")
    start = value.storage_offset() * value.element_size()
    size = value.numel() * value.element_size()
    if not value.is_contiguous() or value.is_neg() or value.is_conj():
        raise UnsafeFileError(f"{where}: a strided view, {tuple(value.stride())} for {tuple(value.shape)}; re-save it.")
    if start + size > member.size:
        raise UnsafeFileError(f"{where}: ends {start + size - member.size} bytes beyond its storage.")
    return TensorInfo(name, code, tuple(value.shape), path, member.start + start, member.start + start + size)


def _check_overlaps(path: Path, infos: Iterable[TensorInfo]) -> None:
    """Names may share a tensor, as tied ones do, but no part of one."""
    before = None
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if before and info.start < before.end and (info.start, info.end) != (before.start, before.end):
            raise UnsafeFileError(f"{path}: {quoted(info.name)} is a part of {quoted(before.name)}; re-save it.")
        before = info


# The formats


def _not_written(*_: object) -> NoReturn:
    raise UnsupportedFeatureError("pickles are not written; convert --to hf (safetensors), which torch reads too.")


def _make(path: Path, specs: Specs) -> dict[str, TensorInfo]:
    _not_written()


@dataclass(frozen=True)
class _Pickled(Sharded):
    """Shards that are pickles, which are read and not written."""

    def check(self, outline: Outline) -> None:
        """Raise UnsupportedFeatureError: pickles are not written."""
        _not_written()

    def create(self, directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
        """Raise UnsupportedFeatureError: pickles are not written."""
        _not_written()


@dataclass(frozen=True)
class _Raw(_Pickled):
    """consolidated.00.pth, which others may go on."""

    def open(self, path: Path, config: MistralConfig | None, seen: Seen = UNSEEN) -> Contents:
        """Understand the header; raises UnsupportedFeatureError where the matrices are cut for several devices."""
        directory = path if path.is_dir() else path.parent
        others = [name for name in reading.names(directory) if _OTHER_PARTS.fullmatch(name)]
        if others:
            raise UnsupportedFeatureError(
                f"{directory}: {self.family.single} goes on in {', '.join(map(quoted, others))}, cut for several "
                "devices; merge them into one consolidated.safetensors first."
            )
        return super().open(path, config)


_BIN = Family(
    "pytorch_model.bin", "pytorch_model-{:05d}-of-{:05d}.bin", "pytorch_model.bin.index.json", PickledFile, _make
)
HF = _Pickled("hf-bin", _BIN, prefix=BASE_PREFIX)
"""pytorch_model.bin, and shards with an index."""

_PTH = Family("consolidated.00.pth", "", "consolidated.pth.index.json", PickledFile, _make)
RAW = _Raw("raw-pth", _PTH, sharded.PARAMS, sharded.raw_name, layouts.rotary_pairs)
"""consolidated.00.pth and params.json."""
