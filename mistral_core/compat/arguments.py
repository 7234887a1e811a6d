"""Arguments of transformers' `from_pretrained` and `save_pretrained`: ours by another name, without effect, or refused.

An argument that is refused says what to use instead; one that nobody knows is left for the config to complain about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, ConversionError, UnsupportedFeatureError

RENAMED = {
    "torch_dtype": "dtype",
    "use_auth_token": "token",
    "device_map": "device",
    "quantization_config": "quantization",
}
"""Old name -> ours."""

NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "from_pt": (True, False),  # checkpoints are the same for every framework
    "from_tf": (True, False),
    "from_flax": (True, False),
    "low_cpu_mem_usage": (True, False, None),  # always so
    "use_safetensors": (True, None),
    "safe_serialization": (True,),
    "trust_remote_code": (False, None),
    "weights_only": (True,),
    "resume_download": (True, False, None),  # always so
    "is_main_process": (True,),
    "push_to_hub": (False,),
    "variant": (None,),
    "subfolder": ("", None),
    "adapter_kwargs": (None,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "force_download": (False,),
    "proxies": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "tp_plan": (None,),
    "state_dict": (None,),
    "saved_model": (False,),
    "version": (1,),
    "signatures": (None,),
    "create_pr": (False,),
    "save_peft_format": (True,),
    "mirror": (None,),
    "tf_to_pt_weight_rename": (None,),
    "load_weight_prefix": (None,),
}
"""Argument -> the values that change nothing here."""

_PLACED = "a model is on one device; say which with device=, or give mistral_torch or mistral_flax a mesh="
ADVICE: Mapping[str, str] = {
    "use_safetensors": "safetensors are read where there are some, pickled files where there is nothing else",
    "safe_serialization": "weights are written as safetensors only, which every framework reads",
    "trust_remote_code": "no code of a checkpoint is ever run; leave it out",
    "weights_only": "of a pickled file nothing but tensors is ever read; leave it out",
    "subfolder": "give the path of the folder itself, or download it first",
    "adapter_kwargs": "load the model, then the adapter with peft.PeftModel.from_pretrained",
    "variant": "give the path of a folder with one set of weights",
    "ignore_mismatched_sizes": "give num_labels for a new head, or resize_token_embeddings after loading",
    "output_loading_info": "missing and unexpected tensors are an error or a warning of their own",
    "force_download": "delete the model from the cache directory, or give another cache_dir",
    "proxies": "set the environment variable HTTPS_PROXY",
    "max_memory": "it goes with device_map='auto' in mistral_torch",
    "offload_folder": "it goes with device_map='auto' in mistral_torch",
    "tp_plan": _PLACED,
    "push_to_hub": "call model.push_to_hub, or write with save_pretrained and then `mistral push`",
    "state_dict": "give the parameters to the model with load_arrays, then save it",
    "is_main_process": "call save_pretrained in one process only",
    "saved_model": "model.export writes a SavedModel",
    "version": "model.export writes a SavedModel",
    "signatures": "model.export writes a SavedModel, its argument is input_signature",
    "create_pr": "it is an argument of model.push_to_hub",
    "save_peft_format": "adapters are written by peft's own save_pretrained",
    "mirror": "set the environment variable HF_ENDPOINT",
    "tf_to_pt_weight_rename": "names are Hugging Face's in every framework; leave it out",
    "load_weight_prefix": "names are Hugging Face's in every framework; leave it out",
}
"""Argument -> what to use instead of a value that means something."""


KNOWN = frozenset({
    *RENAMED, *RENAMED.values(), *NO_EFFECT, "config", "attn_implementation", "seed", "verify", "revision", "cache_dir",
    "local_files_only", "gguf_file", "use_flash_attention_2", "load_in_8bit", "load_in_4bit",
})  # fmt: skip
"""Names that `from_pretrained` knows beside the fields of the config."""


def from_transformers(options: Mapping[str, Any], **ours: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained`, `ours` under our own names (None: not given), in one mapping under our names.

    Raises ConfigError where an argument comes under two names with two values, UnsupportedFeatureError with all that
    are refused.
    """
    result, options = dict(ours), dict(options)
    in_bits = {name: options.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in options}
    if any(in_bits.values()):
        options["quantization_config"] = options.get("quantization_config") or in_bits
    for name, value in meaningful(options).items():
        own = RENAMED.get(name, name)
        if result.get(own) is not None and result[own] != value:
            raise ConfigError(f"{own}={result[own]!r} and {name}={value!r} are one argument; give {own} alone.")
        result[own] = value
    if result.pop("use_flash_attention_2", False):
        result["attn_implementation"] = "flash_attention_2"
    if isinstance(result.get("dtype"), str) and result["dtype"] == "auto":
        result["dtype"] = None
    result["device"] = one_device(result.get("device"))
    return result


def check_saving(options: Mapping[str, Any]) -> None:
    """Raise for arguments of `save_pretrained` that are refused (UnsupportedFeatureError) or none (ConversionError)."""
    unknown = sorted(meaningful(options))
    if unknown:
        raise ConversionError(f"save_pretrained has no argument {unknown}; it has max_shard_size and overwrite.")


def meaningful(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that have an effect here; raises UnsupportedFeatureError with all that are refused."""
    refused = [
        f"{name}={value!r}: {ADVICE[name]}"
        for name, value in options.items()
        if name in ADVICE and not any(value is allowed for allowed in NO_EFFECT[name])
    ]
    if refused:
        raise UnsupportedFeatureError("; ".join(refused) + ".")
    return {name: value for name, value in options.items() if name not in NO_EFFECT}


def one_device(device: Any) -> Any:
    """The device of a `device_map`: of {"": device}, or itself; "auto" is the backend's best.

    Raises UnsupportedFeatureError for a map of several parts.
    """
    if not isinstance(device, Mapping):
        return "auto" if device in ("balanced", "balanced_low_0", "sequential") else device
    if set(device) != {""}:
        raise UnsupportedFeatureError(f"device_map: {dict(device)!r}; {_PLACED}.")
    return device[""]
