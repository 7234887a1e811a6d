"""What a config says of quantised weights: the ways of packing that are read, and no others.

A checkpoint's own `quantization_config` is asked when its tensors are read; what is written follows from the matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError, UnsupportedFeatureError
from ..plain import is_int
from ..telling import warn


class Scheme(NamedTuple):
    """How the matrices of a checkpoint are packed."""

    packing: str
    """A key of `weights.dequantised.PACKINGS`, or `scaled`."""
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


Schemes = tuple[Scheme, ...]
"""The schemes of a file: of several, each matrix fits one, which its own parts tell."""

UNREAD: Mapping[str, str] = {
    "how the library calibrated or searched": (
        "damp_percent damp_auto_increment dataset desc_act static_groups true_sequential model_seqlen batch_size mse "
        "block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize cache_block_outputs "
        "pad_token_id tokenizer observer observer_kwargs actorder quantization_status global_compression_ratio "
        "global_sparsity sparsity_structure registry_requires_subclass meta lm_head quantizer hyb_act"
    ),
    "which kernel computes, and in what dtype: here the numbers are dequantised exactly": (
        "use_exllama exllama_config disable_exllama use_cuda_fp16 max_input_length do_fuse fuse_max_seq_len "
        "modules_to_fuse bnb_4bit_compute_dtype bnb_4bit_use_double_quant llm_int8_threshold llm_int8_has_fp16_weight "
        "llm_int8_enable_fp32_cpu_offload _load_in_4bit _load_in_8bit dequantize"
    ),
    "which matrices are packed: what stands in the file tells it": (
        "modules_to_not_convert llm_int8_skip_modules ignore ignored_layers targets"
    ),
    "how activations or the cache are rounded while a server computes: here they are not": (
        "input_activations output_activations kv_cache_scheme dynamic"
    ),
    "the blocks of a strategy that is not the one told": "block_structure group_size",
    "who wrote it": (
        "version quant_method format is_marlin_format model_file_base_name model_name_or_path checkpoint_format "
        "pack_dtype backend scale_dtype zp_dtype"
    ),
}
"""Why -> keys that change no number of what is dequantised, at any depth."""


class _Asked(Mapping[str, Any]):
    """A mapping that remembers which of its keys were asked for; mappings in it do too."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = {key: _Asked(each) if isinstance(each, Mapping) else each for key, each in given.items()}
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return self._given[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return repr(self._given)

    def unread(self) -> Iterator[str]:
        """Yield the keys that nobody asked for and that may mean something, with the path to each."""
        harmless = frozenset(" ".join(UNREAD.values()).split())
        for key, value in self._given.items():
            if isinstance(value, _Asked) and key in self._asked and key not in harmless:
                yield from (f"{key}.{each}" for each in value.unread())
            elif key not in self._asked and key not in harmless and value is not None:
                yield key


def check(given: Any, *, where: str) -> None:
    """Raise as `read` does, and warn of keys that nobody reads."""
    _check(read, given, f"{where}: quantization_config")


def check_raw(given: Any, *, where: str) -> None:
    """The same of a `quantization` in params.json."""
    _check(read_raw, given, f"{where}: quantization")


def _check(reader: Callable[..., Schemes], given: Any, where: str) -> None:
    asked = _Asked(given) if isinstance(given, Mapping) else given
    reader(asked, where=where.rpartition(":")[0])
    unread = sorted(asked.unread())
    if unread:
        warn(f"{where}: unknown keys {unread} are not used; is it packed as its other keys say?")


def read(given: Any, *, where: str) -> Schemes:
    """The schemes of a Hugging Face `quantization_config`; raises UnsupportedFeatureError, ConfigError."""
    where = f"{where}: quantization_config"
    return _of_method(_object(given, where), where)


def read_raw(given: Any, *, where: str) -> Schemes:
    """The schemes of a `quantization` in params.json, in its own words or in those of a `quantization_config`.

    Raises UnsupportedFeatureError, ConfigError.
    """
    where = f"{where}: quantization"
    given = _object(given, where)
    if given.get("quant_method") is not None:
        return _of_method(given, where)
    _one_of(given, "qformat_weight", ("fp8_e4m3",), where)
    _one_of(given, "qscheme_act", ("TENSOR", "NO_SCALES", None), where)
    return (Scheme("scaled", "FP8", scale="qscale_weight"),)


def _object(given: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must be an object, got {type(given).__name__}.")
    return given


def _of_method(given: Mapping[str, Any], where: str) -> Schemes:
    method = given.get("quant_method")
    if method is None and (given.get("load_in_4bit") or given.get("load_in_8bit")):  # as transformers reads it
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedFeatureError(
            f"{where}: quant_method {method!r}; {', '.join(_METHODS)} are dequantised. Dequantise the checkpoint first."
        )
    found = _METHODS[method](given, f"{where} ({method})")
    return (found,) if isinstance(found, Scheme) else found


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


def _compressed_tensors(given: Mapping[str, Any], where: str) -> Schemes:
    for key in ("sparsity_config", "transform_config"):
        value = given.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedFeatureError(f"{where}: {key} {value!r} is not read; save the checkpoint dense.")
    form = _one_of(given, "format", (*_FORMS, _MIXED), where)
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{where}: config_groups must be an object with at least one group.")
    found = {name: _weights(group, form, where) for name, group in groups.items()}
    _check_apart(groups, found, where)
    return tuple(dict.fromkeys(found.values()))


def _check_apart(groups: Mapping[str, Any], schemes: Mapping[str, Scheme], where: str) -> None:
    """Raise ConfigError where two groups say different things of the same modules."""
    told: dict[str, str] = {}
    for name, group in groups.items():
        targets = group.get("targets")
        for target in targets if isinstance(targets, Sequence) and not isinstance(targets, str) else ():
            other = told.setdefault(str(target), name)
            if schemes[other] != schemes[name]:
                raise ConfigError(f"{where}: {other} and {name} both say how {str(target)!r} is packed; keep one.")


def _weights(group: Any, form: str, where: str) -> Scheme:
    """The scheme of one group of layers."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}: each group of config_groups should tell of its weights.")
    if form == _MIXED:
        form = _one_of(group, "format", _FORMS, where)
    elif group.get("format") not in (None, form):
        raise UnsupportedFeatureError(f"{where}: the format of a group must be {form}, got {group['format']!r}.")
    kinds = {"float-quantized": ("float",), "naive-quantized": ("int", "float")}.get(form, ("int",))
    kind = _one_of(weights, "type", kinds, where, default="int")
    bits = _one_of(weights, "num_bits", (4, 8) if form == "pack-quantized" else (8,), where, default=8)
    symmetric = _one_of(weights, "symmetric", (True, False), where, default=True)
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


_FORMS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_MIXED = "mixed-precision"
_DTYPES = {"int": "I8", "float": "F8_E4M3"}
_METHODS: Mapping[str, Callable[[Mapping[str, Any], str], Scheme | Schemes]] = {
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}


def _one_of(given: Mapping[str, Any], key: str, allowed: Collection[Any], where: str, *, default: Any = None) -> Any:
    """The value of a key, `default` where it is absent; 1 is no True."""
    value = given.get(key, default)
    if not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
        names = ", ".join("absent" if each is None else repr(each) for each in allowed)
        raise UnsupportedFeatureError(f"{where}: {key} is {value!r}; {names} can be dequantised.")
    return value


def _group_size(given: Mapping[str, Any], where: str) -> int | None:
    size = given.get("group_size", 128)
    if size in (None, -1):
        return None
    if not is_int(size) or not 0 < size < 1 << 31:
        raise ConfigError(f"{where}: group_size must be a positive integer or -1, got {size!r}.")
    return int(size)


def _block(value: Any, where: str) -> tuple[int, int]:
    if not (isinstance(value, list) and len(value) == 2 and all(is_int(n) and 0 < n < 1 << 31 for n in value)):
        raise ConfigError(f"{where}: the size of blocks must be two positive integers, got {value!r}.")
    return value[0], value[1]
