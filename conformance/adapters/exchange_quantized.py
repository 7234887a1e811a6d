"""transformers 5, compressed-tensors, bitsandbytes; run by its own interpreter, see conformance/exchange_packed.py.

compressed-tensors unpacks a model at its first call, so nothing is saved after one. transformers loads zero
points to floats at once only, and then of one scheme in all matrices. bitsandbytes' kernel for evaluation rounds to
bfloat16, so models are called as in training.
"""

import json
import sys
from collections.abc import Callable

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    MistralConfig,
    MistralForCausalLM,
)

ARGUMENTS = {
    "int8 row": {"num_bits": 8, "strategy": "channel"},
    "int8 32": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "int4 32": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4 asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
}


def read(packing, path, ids, out):
    """Logits of a directory, and its matrices as the library that owns the format has them."""
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packing == "int4 asymmetric" else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", **options)
    tensors = {f"tensor:{name}.weight": matrix.float().numpy() for name, matrix in unpacked(model)}
    model.train()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(ids))).logits.numpy()
    np.savez(out, logits=logits, **tensors)


def unpacked(model):
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            library = BaseCompressor.get_value_from_registry("pack-quantized")
            yield name, library.decompress(dict(module.state_dict()), scheme)["weight"]
        elif hasattr(getattr(module, "weight", None), "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            yield name, dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, torch.nn.Linear):
            yield name, module.weight.data


def write(packing, weights, config, out):
    """A model packed by the library, saved by transformers."""
    with open(config) as file:
        fields = json.load(file)
    model = MistralForCausalLM(MistralConfig(**fields))
    with np.load(weights) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files}, strict=True)
    if packing.startswith("nf4"):
        model.save_pretrained(f"{out}-plain")
        asked = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=packing == "nf4 doubled"
        )
        AutoModelForCausalLM.from_pretrained(
            f"{out}-plain", dtype=torch.float32, quantization_config=asked
        ).save_pretrained(out)
        return
    pack(model, packing)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


def pack(model, packing):
    """Give every matrix of a layer its scales, and the head too where it is packed."""
    groups = {"group_0": scheme(r"re:.*_proj$", ARGUMENTS[packing])}
    has_head = packing in ("int8 row", "int4 32")
    if has_head:
        groups["group_1"] = scheme(r"re:.*lm_head$", ARGUMENTS["int8 row"])
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups=groups, ignore=[] if has_head else ["lm_head"], quantization_status=QuantizationStatus.FROZEN
        ),
    )
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            arguments, w = module.quantization_scheme.weights, module.weight.data
            rows = w.reshape(len(w), -1, arguments.group_size or w.shape[1])
            scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), arguments)
            module.weight_scale.data = scale
            if not arguments.symmetric:
                module.weight_zero_point.data = zero


def scheme(target, arguments):
    return QuantizationScheme(targets=[target], weights=QuantizationArgs(**arguments), format="pack-quantized")


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"read": read, "write": write}
    commands[sys.argv[1]](*sys.argv[2:])
