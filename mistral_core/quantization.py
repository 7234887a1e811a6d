"""What a config says of quantised weights: the ways of packing that are read, by dequantising, and no others.

A checkpoint's own `quantization_config` is asked when its tensors are read; a model has none, nor has what it writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from .config_checks import is_int
from .errors import ConfigError, UnsupportedFeatureError


class Scheme(NamedTuple):
    """How the matrices of a checkpoint are packed."""

    packing: str
    """A key of `weights.quantized.PACKINGS`."""
    label: str
    """What it is called, for reports."""
    bits: int = 8
    block: tuple[int | None, int | None] | None = None
    """Rows and columns that share one scale, None being all; no block: one scale, or one a row, by their number."""
    dtype: str = "F8_E4M3"
    """Of the numbers beside a scale, by the codes of safetensors."""
    scale: str = ""
    """The name of the scale beside `weight`."""
    symmetric: bool | None = None
    zero_plus_one: bool = True
    """GPTQ of version 1 stores a zero point less one."""


def read(given: Any, *, where: str) -> Scheme:
    """The scheme of a Hugging Face `quantization_config`; raises UnsupportedFeatureError, ConfigError."""
    where = f"{where}: quantization_config"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {type(given).__name__}, an object was expected.")
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):  # as transformers reads it
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedFeatureError(
            f"{where}: quant_method {method!r}; {', '.join(_METHODS)} are dequantised. Dequantise the checkpoint first."
        )
    return _METHODS[method](given, f"{where} ({method})")


def read_raw(given: Any, *, where: str) -> Scheme:
    """The scheme of a `quantization` in params.json; raises UnsupportedFeatureError, ConfigError."""
    where = f"{where}: quantization"
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {type(given).__name__}, an object was expected.")
    _one_of(given, "qformat_weight", ("fp8_e4m3",), where)
    _one_of(given, "qscheme_act", ("TENSOR", "NO_SCALES", None), where)
    return Scheme("scaled", "FP8", scale="qscale_weight")


def _awq(given: Mapping[str, Any], where: str) -> Scheme:
    _one_of(given, "bits", (4,), where)
    _one_of(given, "zero_point", (True,), where)
    _one_of(given, "backend", ("autoawq", None), where)
    version = given.get("version", "gemm")
    _one_of({"version": version.lower() if isinstance(version, str) else version}, "version", ("gemm",), where)
    return Scheme("awq", "AWQ int4", 4, (1, _group_size(given, where)))


def _gptq(given: Mapping[str, Any], where: str) -> Scheme:
    bits = _one_of(given, "bits", (2, 4, 8), where)
    _one_of(given, "is_marlin_format", (False, None), where)
    _one_of(given, "pack_dtype", ("int32", None), where)
    _one_of(given, "sym", (True, False, None), where)
    if given.get("dynamic"):
        raise UnsupportedFeatureError(f"{where}: dynamic, another packing by layer; dequantise the checkpoint first.")
    version = _one_of(given, "checkpoint_format", ("gptq", "gptq_v2", None), where)
    block = (1, _group_size(given, where))
    return Scheme(
        "gptq", f"GPTQ int{bits}", bits, block, symmetric=given.get("sym"), zero_plus_one=version != "gptq_v2"
    )


def _bitsandbytes(given: Mapping[str, Any], where: str) -> Scheme:
    _one_of(given, "load_in_8bit", (False, None), where)
    _one_of(given, "load_in_4bit", (True,), where)
    _one_of(given, "bnb_4bit_quant_type", ("nf4",), where)
    _one_of(given, "bnb_4bit_quant_storage", ("uint8", None), where)
    return Scheme("nf4", "bitsandbytes nf4", 4)


def _fp8(given: Mapping[str, Any], where: str) -> Scheme:
    _one_of(given, "activation_scheme", ("dynamic", "static", None), where)
    _one_of(given, "scale_fmt", ("float", None), where)
    block = given.get("weight_block_size")
    return Scheme("scaled", "FP8", block=None if block is None else _block(block, where), scale="weight_scale_inv")


def _compressed_tensors(given: Mapping[str, Any], where: str) -> Scheme:
    for key in ("sparsity_config", "transform_config"):
        value = given.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedFeatureError(f"{where}: {key} {value!r} is not read; save the checkpoint dense.")
    form = _one_of(given, "format", ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"), where)
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{where}: config_groups, an object with at least one group, was expected.")
    found = {_weights(group, form, where) for group in groups.values()}
    if len(found) > 1:
        raise UnsupportedFeatureError(f"{where}: groups of several kinds; dequantise the checkpoint first.")
    return found.pop()


def _weights(group: Any, form: str, where: str) -> Scheme:
    """The scheme of one group of layers."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}: each group of config_groups should tell of its weights.")
    if group.get("format") not in (None, form):
        raise UnsupportedFeatureError(f"{where}: a group in the format {group['format']!r}; {form} was expected.")
    kinds = {"float-quantized": ("float",), "naive-quantized": ("int", "float")}.get(form, ("int",))
    kind = _one_of({"type": "int", **weights}, "type", kinds, where)
    bits = _one_of({"num_bits": 8, **weights}, "num_bits", (4, 8) if form == "pack-quantized" else (8,), where)
    symmetric = _one_of({"symmetric": True, **weights}, "symmetric", (True, False), where)
    strategies = ("tensor", "channel", "group", "block", None)
    strategy = _one_of(weights, "strategy", strategies, where)
    if strategy is None:  # as the library fills it in
        strategy = "group" if weights.get("group_size") not in (None, -1) else "tensor"
    block: tuple[int | None, int | None] = (1 if strategy == "channel" else None, None)
    if strategy == "group":
        block = (1, _group_size(weights, where))
    elif strategy == "block":
        block = _block(weights.get("block_structure"), where)
    label = f"compressed-tensors {kind}{bits}"
    packing = "packed" if form == "pack-quantized" else "scaled"
    return Scheme(packing, label, bits, block, _DTYPES[kind], "weight_scale", symmetric)


_DTYPES = {"int": "I8", "float": "F8_E4M3"}
_METHODS = {
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}


def _one_of(given: Mapping[str, Any], key: str, allowed: Collection[Any], where: str) -> Any:
    """The value of a key, None where it is absent; 1 is no True."""
    value = given.get(key)
    if not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
        names = ", ".join("absent" if each is None else repr(each) for each in allowed)
        raise UnsupportedFeatureError(f"{where}: {key} is {value!r}; {names} can be dequantised.")
    return value


def _group_size(given: Mapping[str, Any], where: str) -> int | None:
    size = given.get("group_size", 128)
    if size in (None, -1):
        return None
    if not is_int(size) or not 0 < size < 1 << 31:
        raise ConfigError(f"{where}: group_size is {size!r}, a positive integer or -1 was expected.")
    return int(size)


def _block(value: Any, where: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(is_int(n) and 0 < n < 1 << 31 for n in value)):
        raise ConfigError(f"{where}: blocks of {value!r}, two positive integers were expected.")
    return value[0], value[1]
