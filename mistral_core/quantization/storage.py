"""Packed matrices as they are written: compressed-tensors, and bitsandbytes where the codes are nf4.

compressed-tensors 0.20: compressors/pack_quantized and quantization/quant_args.py; bitsandbytes 0.50: functional.py,
QuantState.as_dict. Both are what transformers 5 and vLLM read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import UnsupportedFeatureError
from .blocks import blocks
from .matrix import KINDS, NF4, PackedMatrix, packed_codes, swapped, unsigned

STATE = "weight.quant_state.bitsandbytes__nf4"


def parts_of(matrix: PackedMatrix, dtype: str) -> dict[str, np.ndarray]:
    """Last part of the name -> array of all that stands in a file for a matrix, of a model of `dtype`."""
    return _WRITERS[matrix.kind](matrix, dtype)


def _words(matrix: PackedMatrix, dtype: str) -> dict[str, np.ndarray]:
    bits = KINDS[matrix.kind].bits
    parts = {
        "weight_packed": _as_words(matrix.codes if bits == 4 else unsigned(matrix)),
        "weight_scale": matrix.scale,
        "weight_shape": np.array(matrix.shape, np.int64),
    }
    if matrix.zero is not None:
        numbers: np.ndarray = (matrix.zero.astype(np.int16) + (1 << bits - 1)).astype(np.uint8).T
        words = _as_words(packed_codes("int4", numbers) if bits == 4 else numbers)
        parts["weight_zero_point"] = np.ascontiguousarray(words.T)
    return parts


def _as_words(codes: np.ndarray) -> np.ndarray:
    """Rows of bytes as rows of 32-bit words, filled up with zeros."""
    return np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))).view("<i4")


def _eight_bit_floats(matrix: PackedMatrix, dtype: str) -> dict[str, np.ndarray]:
    scale = matrix.scale.reshape(-1) if arrangement_of(matrix).strategy == "tensor" else matrix.scale
    return {"weight": matrix.codes.view(ml_dtypes.float8_e4m3fn), "weight_scale": scale}


def _nf4(matrix: PackedMatrix, dtype: str) -> dict[str, np.ndarray]:
    return {
        "weight": swapped(matrix.codes).reshape(-1, 1),
        "weight.absmax": matrix.scale.reshape(-1),
        "weight.quant_map": NF4,
        STATE: np.frombuffer(_state(arrangement_of(matrix), dtype), np.uint8),
    }


_WRITERS = {"int8": _words, "int4": _words, "fp8": _eight_bit_floats, "nf4": _nf4}


# What is known of a matrix before there are numbers


class Arrangement(NamedTuple):
    """All of a packed matrix but its numbers."""

    kind: str
    shape: tuple[int, int]
    block: tuple[int, int]
    scale: str
    """The dtype of the scales."""
    symmetric: bool

    @property
    def strategy(self) -> str:
        """What compressed-tensors calls the block."""
        rows, columns = self.block
        if rows == 1:
            return "channel" if columns >= self.shape[1] and self.kind != "nf4" else "group"
        return "tensor" if rows >= self.shape[0] and columns >= self.shape[1] else "block"

    @property
    def label(self) -> str:
        """As people call it: int4 by 128."""
        of = {"group": f" by {self.block[1]}", "channel": " by row", "tensor": " by matrix"}
        return self.kind + of.get(self.strategy, f" by {self.block[0]} x {self.block[1]}")

    @property
    def group(self) -> tuple[Any, ...]:
        """What a config says of it: matrices with equal ones are of one group."""
        return self.kind, self.strategy, self.block if self.strategy in ("group", "block") else None, self.symmetric


def arrangement_of(matrix: PackedMatrix) -> Arrangement:
    """What is known of a matrix without its numbers."""
    return Arrangement(matrix.kind, matrix.shape, matrix.block, matrix.scale.dtype.name, matrix.zero is None)


def specs_of(arrangement: Arrangement, dtype: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Last part of the name -> dtype and shape of what `parts_of` gives."""
    kind, (rows, columns) = arrangement.kind, arrangement.shape
    down, across = blocks(arrangement.shape, arrangement.block)
    scale = np.dtype(arrangement.scale)
    if kind == "nf4":
        return {
            "weight": (np.dtype(np.uint8), (rows * columns // 2, 1)),
            "weight.absmax": (np.dtype(np.float32), (down * across,)),
            "weight.quant_map": (np.dtype(np.float32), (16,)),
            STATE: (np.dtype(np.uint8), (len(_state(arrangement, dtype)),)),
        }
    if kind == "fp8":
        shape = (1,) if arrangement.strategy == "tensor" else (down, across)
        return {"weight": (np.dtype(ml_dtypes.float8_e4m3fn), (rows, columns)), "weight_scale": (scale, shape)}
    bits = KINDS[kind].bits
    specs: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "weight_packed": (np.dtype("<i4"), (rows, math.ceil(columns * bits / 32))),
        "weight_scale": (scale, (down, across)),
        "weight_shape": (np.dtype("<i8"), (2,)),
    }
    if not arrangement.symmetric:
        specs["weight_zero_point"] = np.dtype("<i4"), (math.ceil(down * bits / 32), across)
    return specs


def _state(arrangement: Arrangement, dtype: str) -> bytes:
    """What bitsandbytes says of a matrix."""
    state = {"quant_type": "nf4", "blocksize": arrangement.block[1], "dtype": dtype, "shape": list(arrangement.shape)}
    return json.dumps(state).encode()


# The config beside them


def config_of(arrangements: Mapping[str, Arrangement], linears: Collection[str], dtype: str) -> dict[str, Any]:
    """The `quantization_config` of a file in which some of a model's `linears`, all by tensors' names, are packed.

    Raises UnsupportedFeatureError for kinds that no one file holds.
    """
    groups: dict[tuple[Any, ...], list[str]] = {arrangement.group: [] for arrangement in arrangements.values()}
    for name, arrangement in arrangements.items():
        by_size = arrangement.kind, "group", arrangement.block, arrangement.symmetric  # which a whole row may be too
        groups[by_size if by_size in groups else arrangement.group].append(_module(name))
    groups = {group: names for group, names in groups.items() if names}
    kinds = sorted({arrangement.kind for arrangement in arrangements.values()})
    rest = [_module(name) for name in linears if name not in arrangements]
    if kinds == ["nf4"]:
        return _config_of_nf4(dtype, rest)
    if "nf4" in kinds or ("fp8" in kinds and len(kinds) > 1):
        raise UnsupportedFeatureError(
            f"matrices of {' and '.join(kinds)} cannot stand in one file; quantize the model with one scheme."
        )
    ends = {group: {name.rpartition(".")[2] for name in names} for group, names in groups.items()}
    apart = sum(map(len, ends.values())) == len(set().union(*ends.values()))
    form = "float-quantized" if kinds == ["fp8"] else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",  # without it transformers draws fresh weights
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": rest,
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else _targets(ends[group]) if apart else names,
                "input_activations": None,
                "output_activations": None,
                "format": form,
                "weights": _weights(*group),
            }
            for number, (group, names) in enumerate(groups.items())
        },
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _targets(ends: Collection[str]) -> list[str]:
    """Modules by the ends of their names, as regular expressions, for a library may nest them in another model."""
    return [f"re:.*{end}$" for end in sorted(ends)]


def _weights(kind: str, strategy: str, block: tuple[int, int] | None, symmetric: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "num_bits": KINDS[kind].bits,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": block[1] if strategy == "group" and block else None,
        "dynamic": False,
    }
    if strategy == "block" and block:
        told["block_structure"] = list(block)
    return told


def _config_of_nf4(dtype: str, rest: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": rest or None,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
