"""Any checkpoint to any format: one tensor at a time, read back, all or nothing."""

from __future__ import annotations

import functools
import math
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..disk import files, reading
from ..disk.into import MANIFEST
from ..disk.names import CONFIG_FILES, TEMPLATES, TEXT_FILES, VISION_FILES
from ..errors import (
    ConversionError,
    CorruptCheckpointError,
    DtypeMismatchError,
    LossyConversionError,
    NonFiniteWeightsError,
    OutputExistsError,
)
from ..lora.merging import EMBEDDING, Merging
from ..parameters import LM_HEAD, shapes
from ..quantization import calibration, request, storage
from ..quantization.matrix import KINDS, PackedMatrix, dequantised
from ..quantization.request import Quantization
from ..quantization.storage import Arrangement
from ..threads import Threads
from . import casting, fingerprint, formats, lazy, manifest, towers
from .containers.shards import shard_bytes
from .containers.tensor_file import DTYPES, STORED
from .contents import StoredTensor, fits_in_cache
from .formats.base import Format, Lossy, Moving, Outline, texts_in
from .layouts import as_it_is
from .matching import canonical_names, match, own_class
from .opening import Checkpoint
from .report import Report as Report
from .report import told
from .sources import PRESET_FILES, resolve_checkpoint
from .writing import write_checkpoint

VERIFY = ("off", "hashes", "logits")
GGUF_TYPES = ("Q8_0", "Q4_0")


def convert(
    source: files.PathLike,
    destination: files.PathLike,
    *,
    to: str,
    source_format: str | None = None,
    config: MistralConfig | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: str = "hashes",
    allow_lossy: bool = False,
    check_finite: bool = True,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    options: Mapping[str, str] | None = None,
    keep_vision: bool = False,
    quantization: Any = None,
    calibrate: np.ndarray | None = None,
    calibrated: calibration.Progress | None = None,
    adapter: files.PathLike | None = None,
    **hub_arguments: Any,
) -> Report:
    """Write the checkpoint at a path or hub id as another format, bit for bit, into the directory `destination`.

    `to` and `source_format` are names of `formats.FORMATS`; the source's is found out where it can be only one.
    `dtype` (None: each tensor's own) is float64, float32, bfloat16, float16 or, in GGUF, Q8_0 or Q4_0. `verify` is off,
    hashes (everything is read back and hashed), or logits (and run through the reference). What would change numbers
    raises LossyConversionError unless `allow_lossy`; NaN or infinity NonFiniteWeightsError unless not `check_finite`.
    `progress(done, total)` is told bytes. `options` are those of one format. `config` is for a source that has none.
    Of a model that also sees, the text part is written; with `keep_vision` the whole, the other towers as they are.
    `quantization`, as `from_pretrained` takes it, packs matrices into few bits on their way to `hf`, where packed ones
    stay packed unless there is a `dtype`; elsewhere they become floats, and the report says whether exactly. With texts
    to `calibrate` on, token ids [N, T], codes are chosen by GPTQ; `calibrated(done, total, seconds left)` is told.
    The LoRA adapter in a directory `adapter` is merged on the way, into packed matrices as the floats that they mean.

    The destination is the old one or the new one, whole, whatever happens. Raises ConversionError, CheckpointError,
    ConfigError, HubError and their kinds.
    """
    if verify not in VERIFY:
        raise ConversionError(f"verify must be one of {', '.join(VERIFY)}, got {verify!r}.")
    started = time.monotonic()
    target = files.as_path(destination)
    row = formats.FORMATS.get(to)
    if row is None or not row.written:
        writable = ", ".join(name for name, each in formats.FORMATS.items() if each.written)
        raise ConversionError(f"to must be a format that is written, one of {writable}, got {to!r}.")
    limit, asked = shard_bytes(max_shard_size), request.of(quantization)
    if asked is not None and (to != "hf" or keep_vision):
        raise ConversionError("quantization must be None unless to is hf, and without keep_vision; leave it out.")
    with files.os_errors(target):
        _check_target(target, overwrite)
    path = reading.held(
        resolve_checkpoint(source, format=source_format, one_format=source_format is None, **hub_arguments)
    )
    with files.os_errors(target):
        _check_apart(path, target)
    checkpoint = Checkpoint.open(path, format=source_format, one_format=True, config=config)
    manifest.verify(checkpoint.directory, "sizes")
    if keep_vision:
        towers.check_kept(checkpoint, to)
    plan = _plan(checkpoint, target, to, dtype, options, allow_lossy, keep_vision, asked, adapter)
    if calibrate is not None:
        if plan.quantization is None:
            raise ConversionError("calibrate must be None without quantization; leave it out.")
        plan.calibrate, plan.calibrated = calibrate, calibrated
    _check_lossless(plan, allow_lossy, check=not dry_run)
    if dry_run:
        return plan.report
    _write(plan, limit, overwrite, verify, allow_lossy, check_finite, progress)
    plan.report.seconds = time.monotonic() - started
    return plan.report


# The plan


@dataclass
class _Plan:
    checkpoint: Checkpoint
    target: Path
    format: str
    outline: Outline
    sources: Mapping[str, str]
    """Canonical name -> name in the source."""
    report: Report
    known_losses: dict[str, str]
    """What is lost whatever the numbers are."""
    exact: frozenset[str]
    """Names of packed matrices all of whose numbers the floats that are written hold."""
    quantization: Quantization | None = None
    """How matrices are packed on their way; None: packed ones stay as they are."""
    calibrate: np.ndarray | None = None
    """Token ids [N, T] by which codes are chosen; None: the nearest are."""
    calibrated: calibration.Progress | None = None
    merging: Merging | None = None
    """An adapter that is folded in on the way."""


def _plan(
    checkpoint: Checkpoint,
    target: Path,
    to: str,
    dtype: str | None,
    options: Mapping[str, str] | None,
    allow_lossy: bool,
    keep_vision: bool,
    asked: Quantization | None,
    adapter: files.PathLike | None,
) -> _Plan:
    config = checkpoint.config
    names = canonical_names(checkpoint.tensors)
    architecture = own_class(config, names)
    matched = match(checkpoint.tensors, config, architecture, read=checkpoint.read, where=str(checkpoint.path))
    sources = {name: source for name, source in matched.items() if source is not None}
    merging = None if adapter is None else Merging(files.as_path(adapter), config, architecture)
    if merging is not None:
        config = merging.config
        if merging.unties:
            sources[LM_HEAD] = sources[EMBEDDING]
    code, chosen = _code_of(dtype, to), {**(options or {}), "allow_lossy": "yes" if allow_lossy else "no"}
    if dtype is not None and dtype.upper() in GGUF_TYPES:
        chosen["gguf_type"] = dtype.upper()
    dtypes = {name: code or checkpoint.tensors[source].dtype for name, source in sources.items()}
    texts = {name: read() for name, read in checkpoint.texts.items()}
    others = checkpoint.skipped if keep_vision else {}
    if keep_vision:
        texts |= {name: read() for name, read in texts_in(checkpoint.directory, VISION_FILES).items()}
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in others.items()}
    asked = None if asked is None else asked.resolved(config, architecture)
    if asked is not None:
        checkpoint.check_floats()
        packed = _to_be_packed(asked, config, architecture, dtypes)
    else:
        stays = to == "hf" and dtype is None and not others and merging is None
        packed = _staying_packed(checkpoint, sources) if stays else {}
    outline = Outline(config, architecture, dtypes, texts, chosen, packed, specs)
    chosen_format = formats.format_named(to)
    chosen_format.check(outline)
    floats = {name: checkpoint.tensors[source] for name, source in sources.items() if name not in packed}
    exact = frozenset(name for name, tensor in floats.items() if _is_exact(tensor, code))
    source_losses = {tensor.loss for name, tensor in floats.items() if tensor.loss and name not in exact}
    losses = {"source": "; ".join(sorted(source_losses))} if source_losses else {}
    losses |= chosen_format.lossy(outline) if isinstance(chosen_format, Lossy) else {}
    report = _report(checkpoint, target, to, outline, sources)
    report.moves = _moves(checkpoint, sources, outline, chosen_format)
    report.moves |= {"dequantised exactly": len(exact)} if exact else {}
    report.losses = dict(losses)
    if merging is not None:
        merged = len(merging.changed)
        base = "the dequantised base" if any(tensor.packed for tensor in floats.values()) else "the base"
        report.moves |= {f"merged with the adapter into {base}": merged}
    if asked is not None:
        report.losses["quantization"] = f"{len(packed)} matrices become {told(report.packed)}"
    return _Plan(checkpoint, target, to, outline, sources, report, losses, exact, asked, merging=merging)


def _to_be_packed(
    asked: Quantization, config: MistralConfig, architecture: str, dtypes: Mapping[str, str]
) -> dict[str, Arrangement]:
    """Canonical name -> how a matrix of floats will be packed."""
    rows = shapes(config, architecture)
    return {
        name: asked.arrangement(name, (rows[name][0], rows[name][1]), DTYPES[dtypes[name]].name)
        for name in asked.matrices(config, architecture)
    }


def _staying_packed(checkpoint: Checkpoint, sources: Mapping[str, str]) -> dict[str, Arrangement]:
    """Canonical name -> how a matrix is packed and stays."""
    found = {name: packed for name, source in sources.items() if (packed := checkpoint.packed(source)) is not None}
    matrices = ((name, packed.matrix()) for name, packed in found.items())
    return {name: storage.arrangement_of(matrix) for name, matrix in matrices if matrix is not None}


def _is_exact(tensor: StoredTensor, code: str | None) -> bool:
    """Whether float32, being asked for, holds every number of a packed matrix: integers times scales of few bits."""
    if tensor.packed is None or code != "F32":
        return False
    matrix = tensor.packed.matrix()
    return matrix is not None and KINDS[matrix.kind].is_integer and matrix.scale.dtype != np.float32


def _report(checkpoint: Checkpoint, target: Path, to: str, outline: Outline, sources: Mapping[str, str]) -> Report:
    """All but what moves and what is lost."""
    sizes = {name: math.prod(shape) for name, shape in shapes(outline.config, outline.architecture).items()}
    size = sum(sizes[name] * DTYPES[outline.dtypes[name]].itemsize for name in sources if name not in outline.packed)
    size += sum(math.prod(shape) * STORED[code].itemsize for code, shape in outline.parts().values())
    others = towers.counted(checkpoint.skipped, checkpoint.format)
    return Report(
        str(checkpoint.path),
        checkpoint.format,
        str(target),
        to,
        outline.architecture,
        len(sources),
        size + sum(checkpoint.skipped[name].nbytes for name in outline.others),
        _counted(code for name, code in outline.dtypes.items() if name not in outline.packed),
        {},
        sorted(outline.texts),
        kept=others if outline.others else {},
        left_out={} if outline.others else others,
        packed=_counted(arrangement.label for arrangement in outline.packed.values()),
    )


def _code_of(dtype: str | None, to: str) -> str | None:
    """The dtype code to cast to before writing; None where tensors keep their own."""
    if dtype is None or (to == "gguf" and dtype.upper() in GGUF_TYPES):
        return None
    for code, kind in DTYPES.items():
        if dtype in (kind.name, code):
            return code
    names = [kind.name for kind in DTYPES.values()]
    raise DtypeMismatchError(f"dtype must be one of {', '.join(names)} (gguf: {', '.join(GGUF_TYPES)}), got {dtype!r}.")


def _counted(items: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _moves(
    checkpoint: Checkpoint,
    sources: Mapping[str, str],
    outline: Outline,
    target: Format,
) -> dict[str, int]:
    """What the source's layout and the target's ask for; a move that is undone and done again is told twice."""
    undone = (move for source in sources.values() if (move := checkpoint.tensors[source].moves))
    layout_of = target.layout_of if isinstance(target, Moving) else as_it_is
    done = (move for row in outline.rows().values() if (move := layout_of(row).moves))
    before = {f"no longer {move}": count for move, count in _counted(undone).items()}
    return before | {f"now {move}": count for move, count in _counted(done).items()}


# Checks before anything is written


def _check_target(target: Path, overwrite: bool) -> None:
    if target.suffix in (".gguf", ".safetensors", ".msgpack", ".h5", ".keras") and not target.is_dir():
        raise ConversionError(
            f"{target}: names a file; give a directory, in which the weights, the config and the manifest will lie."
        )
    if os.path.lexists(target) and not overwrite:
        raise OutputExistsError(f"{target}: is there already; choose another path or pass overwrite (--overwrite).")


def _check_apart(source: Path, target: Path) -> None:
    """Raise ConversionError where one lies in the other, by whatever names."""
    real_source, real_target = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    folder = real_source if real_source.is_dir() else real_source.parent
    same = target.exists() and os.path.samefile(folder, target)
    if (
        same
        or real_source.is_relative_to(real_target)
        or (real_source.is_dir() and real_target.is_relative_to(real_source))
    ):
        raise ConversionError(f"{target}: is, holds or lies in the source {source}; choose another directory.")


def _check_lossless(plan: _Plan, allow_lossy: bool, *, check: bool) -> None:
    if check and plan.known_losses and not allow_lossy:
        lines = "; ".join(f"{name}: {loss}" for name, loss in list(plan.known_losses.items())[:4])
        raise LossyConversionError(
            f"{plan.checkpoint.path} -> {plan.format} changes numbers ({lines}); pass allow_lossy (--allow-lossy) if "
            "that is meant."
        )


# Writing


def _write(
    plan: _Plan,
    limit: int,
    overwrite: bool,
    verify: str,
    allow_lossy: bool,
    check_finite: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    checkpoint = plan.checkpoint
    losses: dict[str, casting.Loss] = {}
    with (
        files.atomic_directory(
            plan.target, overwrite=overwrite, replaces=REPLACED, most=_modes(checkpoint)
        ) as temporary,
        Threads(1) as beside,
    ):
        described = functools.partial(_source, hashes=verify != "off", all_is_read=bool(plan.outline.others))
        source = beside.submit(described, checkpoint)
        stream = _ahead(_cast(plan, allow_lossy, check_finite, losses))
        told = _told(stream, plan.report.bytes, progress)
        by_format: dict[str, casting.Loss] = {}
        description = write_checkpoint(
            temporary, plan.format, plan.outline, told, limit=limit, hashes=verify != "off", losses=by_format
        )
        for name, loss in (*losses.items(), *by_format.items()):
            known = plan.report.losses.get(name)
            plan.report.losses[name] = f"{known}: {loss}" if known else str(loss)
        if verify == "logits":
            plan.report.logits = _same_logits(plan, temporary)
        description |= {
            "config": _config(plan).to_dict(),
            "checkpoint": {"format": plan.format, "architecture": plan.outline.architecture},
            "source": source.result(),
            "losses": plan.report.losses,
        }
        if plan.report.logits is not None:
            description["logits"] = plan.report.logits
        checkpoint.check_unchanged()
        manifest.store(temporary, description)


REPLACED = (
    *files.WEIGHT_FILES,
    *(name.partition("/")[0] for row in formats.FORMATS.values() for name in row.files),
    *("flax_model-*.msgpack", "tf_model-*.h5", "model_*.weights.h5", "consolidated.*.pth", "pytorch_model-*.bin"),
    *CONFIG_FILES,
    *PRESET_FILES,
    *("assets", TEMPLATES),
    *TEXT_FILES,
    *VISION_FILES,
)
"""What a converted checkpoint never keeps from the directory that it replaces; everything else stays."""


def _cast(
    plan: _Plan, allow_lossy: bool, check_finite: bool, losses: dict[str, casting.Loss]
) -> Iterator[tuple[str, np.ndarray | PackedMatrix]]:
    """The tensors in the order of the source's files."""
    checkpoint = plan.checkpoint
    cached = fits_in_cache(plan.report.bytes)
    for name, source in sorted(plan.sources.items(), key=lambda pair: checkpoint.place(pair[1])):
        if plan.calibrate is not None and name in plan.outline.packed:
            continue
        tensor, code = checkpoint.tensors[source], plan.outline.dtypes[name]
        stays = tensor.packed is not None and name in plan.outline.packed
        matrix = tensor.packed.matrix() if tensor.packed is not None and (stays or name in plan.exact) else None
        if matrix is not None and stays:
            yield name, matrix
            continue
        array = checkpoint.read(source, cached=cached) if matrix is None else dequantised(matrix)
        del matrix
        if check_finite and (first := casting.first_not_finite(array)) is not None:
            raise NonFiniteWeightsError(
                f"{checkpoint.path}: NaN or infinity in {name}, first at {first}; pass check_finite=False "
                "(--allow-nonfinite) to convert it as it is."
            )
        if plan.merging is not None:
            array = plan.merging.tensor(name, array, DTYPES[code])
        array, loss = casting.cast(array, DTYPES[code])
        if loss.changed:
            losses[name] = loss
            if not allow_lossy:
                raise LossyConversionError(
                    f"{name} as {code}: {loss}; pass allow_lossy (--allow-lossy) if that is meant."
                )
        if plan.quantization is not None and name in plan.outline.packed:
            yield name, plan.quantization.quantise(name, array)
        else:
            yield name, array
        del array  # before the next one comes
    if plan.calibrate is not None and plan.quantization is not None:
        yield from calibration.packed(
            plan.outline.config, _as_written(plan), plan.calibrate, plan.quantization,
            architecture=plan.outline.architecture, progress=plan.calibrated,
        )  # fmt: skip
    for name in sorted(plan.outline.others, key=lambda name: checkpoint.skipped[name].start):
        yield name, checkpoint.skipped[name].load(None, cached)


def _as_written(plan: _Plan) -> lazy.Lazy[np.ndarray]:
    """The tensors of a plan's source in the dtypes that are written, which scales come in."""

    def read(name: str, source: str) -> np.ndarray:
        array, dtype = plan.checkpoint.read(source), DTYPES[plan.outline.dtypes[name]]
        if plan.merging is not None:
            array = plan.merging.tensor(name, array, dtype)
        return casting.cast(array, dtype)[0]

    return lazy.Lazy({name: functools.partial(read, name, source) for name, source in plan.sources.items()})


_Stream = Iterator[tuple[str, np.ndarray | PackedMatrix]]


def _ahead(stream: _Stream) -> _Stream:
    """The same stream, its next item being made while the last one is used."""
    with Threads(1) as reader:
        coming = reader.submit(next, stream, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, stream, None)
            yield item
            del item


def _told(stream: _Stream, total: int, progress: Callable[[int, int], None] | None) -> _Stream:
    done = 0
    for name, array in stream:
        done += array.nbytes
        yield name, array
        del array
        if progress is not None:
            progress(done, total)


def _modes(checkpoint: Checkpoint) -> int:
    """What the source lets others do: what is made of it lets them do no more."""
    modes = [path.stat().st_mode for path in (*checkpoint.shards, checkpoint.directory)]
    return functools.reduce(operator.and_, modes, 0o777)


def _config(plan: _Plan) -> MistralConfig:
    codes = [code for code in plan.outline.dtypes.values() if code in DTYPES]
    dtype = DTYPES[codes[0]].name if codes else None
    return plan.outline.config.replace(architectures=(plan.outline.architecture,), dtype=dtype)


def _source(checkpoint: Checkpoint, *, hashes: bool, all_is_read: bool) -> dict[str, Any]:
    """Where a checkpoint came from: the commit, if it is a hub snapshot, and its files.

    Unless `all_is_read`, a file of nothing but other towers is not hashed.
    """
    known: dict[str, Any] = {}
    if (checkpoint.directory / MANIFEST).exists():
        known = manifest.read(checkpoint.directory)["files"]
    entries = {}
    for path, shard in checkpoint.shards.items():
        name = checkpoint.name_of(path)
        is_read = all_is_read or not checkpoint.skipped.keys() >= shard.tensors.keys()
        digest = known.get(name, {}).get("sha256") or (manifest.file_digest(path) if hashes and is_read else None)
        entries[name] = {"size": shard.stamp[2], "sha256": digest}
    snapshot = checkpoint.directory.name if checkpoint.directory.parent.name == "snapshots" else None
    return {"format": checkpoint.format, "files": entries, "commit": snapshot}


def _same_logits(plan: _Plan, directory: Path) -> dict[str, Any]:
    """The fingerprint of source and result; raises CorruptCheckpointError where they should be equal and are not."""
    before = fingerprint.of(plan.checkpoint, plan.outline.architecture)
    after = fingerprint.of(
        formats.format_named(plan.format).open(directory, plan.outline.config), plan.outline.architecture
    )
    difference = fingerprint.difference(before, after)
    if plan.merging is not None:  # what an adapter changes, which the report does not judge
        return after
    if difference and not plan.report.losses:
        raise CorruptCheckpointError(
            f"{plan.target}: its logits differ from the source's by {difference:.3g}; report this as a bug."
        )
    return {**after, "max_abs_difference_from_source": difference}
