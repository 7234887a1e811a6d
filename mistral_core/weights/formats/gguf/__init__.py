"""GGUF of the architectures llama and mistral3: one file, rotary rows in interleaved pairs, vectors always float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ....config import MistralConfig
from ....disk import files, reading, strict_json
from ....errors import ConversionError, CorruptCheckpointError, UnsupportedFeatureError
from ....parameters import Parameter, layer_of, parameters, shape_of
from ....telling import warn
from ... import carried, layouts
from ...casting import narrowed, widened
from ...containers import tensor_file
from ...containers.gguf import file as gguf_file
from ...containers.gguf.file import GgufFile
from ...containers.gguf.kinds import KINDS, LARGEST, QUANTISED, dequantised, nbytes, quantised
from ...containers.gguf.scan import ALIGNMENT, DEFAULT_ALIGNMENT, Value
from ...containers.tensor_file import DTYPES, TensorInfo, quoted
from ...contents import Contents, StoredTensor, stored_in_layout
from .. import base
from ..base import Outline, Target
from . import config as gguf_config
from . import texts as gguf_texts
from . import tokenizer as gguf_tokenizer
from .vocabulary import has_tokenizer

SINGLE = "model.gguf"
layout_of = layouts.rotary_pairs
NARROW = "mistral.dtypes"
"""Ours: a JSON object, name of a vector -> what it was before it became float32 for llama.cpp."""

OPTION = "gguf_type"
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7}
_FREQUENCIES = "rope_freqs.weight"


# Reading


def open(path: Path, config: MistralConfig | None, seen: base.Seen = base.UNSEEN) -> Contents:
    """Scan the header."""
    file = GgufFile(_file_at(path))
    directory = file.path.parent
    fields = gguf_config.read(file)
    config = config or carried.config(directory, fields)
    rows = {row.gguf.format(layer_of(name)): (name, row) for name, row in parameters(config) if row.gguf}
    tensors = stored_in_layout([file], config, rows, layout_of)
    _check_frequencies(file, tensors)
    tensors = {name: _as_floats(tensor) for name, tensor in tensors.items()}
    return Contents(
        path,
        "gguf",
        {file.path: file},
        tensors | _narrowed(file, tensors),
        lambda: config,
        _texts(file, directory),
        directory,
    )


def _file_at(path: Path) -> Path:
    """The file itself, or the one of a directory."""
    if not path.is_dir() or (path / SINGLE).exists():
        return path / SINGLE if path.is_dir() else path
    names = [name for name in reading.names(path) if name.endswith(".gguf")]
    if not names:
        raise base.nothing_here(path, SINGLE)
    if len(names) > 1:
        raise ConversionError(f"{path}: holds {', '.join(map(quoted, names))}; give the path of one of them.")
    return path / names[0]


def _as_floats(tensor: StoredTensor) -> StoredTensor:
    """Quantised tensors are read as float32."""
    if tensor.dtype not in QUANTISED:
        return tensor
    return tensor._replace(dtype="F32", loss=f"dequantised from {tensor.dtype}")


def _narrowed(file: GgufFile, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The vectors that were widened, as they were; one that somebody trained since then stays as it is."""
    text = file.values.get(NARROW, "{}")
    where = f"{file.path}: {NARROW}"
    if not isinstance(text, str):
        raise CorruptCheckpointError(f"{where} is no string; convert it again.")
    codes = strict_json.parse_object(text.encode(), where=where, error=CorruptCheckpointError)
    found = {}
    for name, code in codes.items():
        tensor = tensors.get(name)
        if code not in ("BF16", "F16") or tensor is None or tensor.dtype != "F32" or len(tensor.shape) != 1:
            raise CorruptCheckpointError(f"{where}: {quoted(name)} is no vector of F32, or {code!a} no narrower type.")
        if narrowed(file.read(tensor.name), DTYPES[code]) is not None:
            found[name] = tensor._replace(dtype=code, load=_narrow(tensor, code))
    return found


def _narrow(tensor: StoredTensor, code: str) -> Callable[[slice | None, bool], np.ndarray]:
    def load(rows: slice | None, cached: bool) -> np.ndarray:
        array = narrowed(tensor.load(rows, cached), DTYPES[code])
        if array is None:
            raise CorruptCheckpointError(f"{tensor.file}: {quoted(tensor.name)} changed while it was read.")
        return array

    return load


def _check_frequencies(file: GgufFile, tensors: dict[str, StoredTensor]) -> None:
    """Factors on the rotary frequencies are Llama 3's scaling, unless they are all 1."""
    if _FREQUENCIES in tensors:
        if tensors[_FREQUENCIES].nbytes > 1 << 20 or not np.all(file.read(_FREQUENCIES) == 1):
            raise UnsupportedFeatureError(f"{file.path}: {_FREQUENCIES} scales frequencies; no Mistral has that.")
        del tensors[_FREQUENCIES]


def _texts(file: GgufFile, directory: Path) -> dict[str, Callable[[], bytes]]:
    """Files in the directory; where none of them is a tokenizer, the one in the file."""
    beside = base.texts_in(directory)
    return beside if has_tokenizer(beside) else gguf_texts.texts(file) | beside


# Writing


def check(outline: Outline) -> None:
    """Raise UnsupportedFeatureError for what GGUF, or llama.cpp, cannot take."""
    base.refuse_heads(outline, "gguf")
    gguf_config.write(outline.config)
    kind = outline.options.get(OPTION)
    if kind is not None and kind not in LARGEST:
        raise UnsupportedFeatureError(f"gguf: {OPTION} is {kind!r}; {' and '.join(LARGEST)} are written.")
    if "F64" in outline.dtypes.values():
        raise UnsupportedFeatureError("gguf: llama.cpp has no arithmetic for float64; convert with --dtype float32.")


def lossy(outline: Outline) -> dict[str, str]:
    """Name -> loss of what is quantised."""
    codes = {name: _code(name, row, outline) for name, row in outline.rows().items()}
    return {name: f"quantised to {code}" for name, code in codes.items() if code in QUANTISED}


def create(directory: Path, outline: Outline, limit: int) -> dict[str, Target]:
    """The texts, and a header with places for the tensors; GGUF is one file, whatever the limit."""
    base.write_texts(directory, outline.texts)
    rows, config = outline.rows(), outline.config
    names = {name: row.gguf.format(layer_of(name)) for name, row in rows.items() if row.gguf}
    specs = {names[name]: (_code(name, row, outline), shape_of(row, config)) for name, row in rows.items()}
    files.require_space(directory, sum(nbytes(*spec) for spec in specs.values()))
    if config.layer_windows[0] is not None and config.layer_windows[0] < config.max_position_embeddings:
        warn(
            f"gguf: llama.cpp ignores sliding_window {config.layer_windows[0]}; there, longer texts are answered as "
            "by a model without a window."
        )
    infos = gguf_file.create(directory / SINGLE, _values(outline, specs), specs)
    return {name: _target(infos[names[name]], row, outline) for name, row in rows.items()}


def _code(name: str, row: Parameter, outline: Outline) -> str:
    """What a tensor is written as."""
    if len(row.axes) == 1:  # llama.cpp adds and multiplies by float32 vectors only
        return "F32"
    kind = outline.options.get(OPTION)
    if kind is not None and shape_of(row, outline.config)[1] % KINDS[kind].values == 0:
        return kind
    return outline.dtypes[name]


def _values(outline: Outline, specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Value | list[str]]:
    codes = [code for code, shape in specs.values() if len(shape) > 1]
    kind = max(codes, key=codes.count)
    values: dict[str, Value | list[str]] = {
        gguf_config.ARCHITECTURE: gguf_config.architecture(outline.config),
        "general.type": "model",
        "general.name": "Mistral",
        "general.file_type": np.uint32(_FILE_TYPES[kind]),
        ALIGNMENT: np.uint32(DEFAULT_ALIGNMENT),
    }
    if OPTION in outline.options:
        values["general.quantization_version"] = np.uint32(2)
    widened = {name: outline.dtypes[name] for name, row in outline.rows().items() if len(row.axes) == 1}
    narrow = {name: code for name, code in widened.items() if code != "F32"}
    if narrow:
        values[NARROW] = json.dumps(narrow)
    return values | gguf_config.write(outline.config) | gguf_tokenizer.keys(outline)


def _target(info: TensorInfo, row: Parameter, outline: Outline) -> Target:
    def stored(array: np.ndarray) -> np.ndarray:
        if info.dtype in QUANTISED:
            return quantised(array, info)
        return widened(array) if len(row.axes) == 1 else array

    def write(array: np.ndarray) -> None:
        array = layouts.to_stored(array, row, outline.config, layout_of(row))
        tensor_file.write_bytes(info, tensor_file.as_bytes(stored(array)))

    def comes_back(array: np.ndarray) -> np.ndarray:
        return dequantised(stored(array), info) if info.dtype in QUANTISED else array

    return Target(write, comes_back)
