"""Quantised Mistrals by the libraries that made such files, and what those libraries dequantise them to.

Run in this directory by an interpreter with torch, transformers, bitsandbytes 0.50, compressed-tensors 0.20, AutoAWQ
0.2.9 and AutoGPTQ 0.7.1 (the last two may be unpacked sources on PYTHONPATH: of each one file is used, and no kernel).
"""

import json
import sys
import types
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM

for name in (
    "awq",
    "awq.modules",
    "awq.modules.linear",
    "auto_gptq",
    "auto_gptq.nn_modules",
    "auto_gptq.nn_modules.qlinear",
):  # their own imports need old packages
    parent, _, leaf = name.rpartition(".")
    places = sys.modules[parent].__path__ if parent else sys.path
    package = types.ModuleType(name)
    package.__path__ = [str(Path(place) / leaf) for place in places if (Path(place) / leaf).is_dir()]
    sys.modules[name] = package

from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402

SHAPE = {
    "vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": 8,
}  # fmt: skip
GROUP = 16


def make(name, dtype, quantization, pack, size=32):
    random = np.random.default_rng(0)
    config = MistralConfig(
        **SHAPE, hidden_size=size, intermediate_size=size, head_dim=size // 4, architectures=["MistralForCausalLM"]
    )
    state, expected = {}, {}
    for key, value in MistralForCausalLM(config).state_dict().items():
        values = torch.from_numpy(random.standard_normal(tuple(value.shape), np.float32) / 8).to(dtype)
        if "_proj" in key:
            base = key.removesuffix(".weight")
            parts, dense = pack(values)
            state |= {f"{base}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            assert (dense.float() - values.float()).abs().max() < 0.2, "not what was put in"
            if "q_proj" in key:  # the others are packed no differently
                expected[key] = dense.contiguous()
        else:
            state[key] = values
    directory = Path(__file__).parent / "quantized" / name
    directory.mkdir(parents=True, exist_ok=True)
    data = {**config.to_dict(), "dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(data, indent=1, default=str))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    save_file(expected, directory / "beside.safetensors", {"format": "pt"})


def limits(weight, bits):
    """Scales and zero points [out, groups], asymmetric."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / (2**bits - 2)).half().float()  # one less: these packers round past the end
    return scale, torch.ceil(-low / scale).clamp(1, 2**bits - 1)


def linear(weight):
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.float16)
    layer.weight.data = weight.half()
    return layer


def awq(weight):
    scale, zero = limits(weight, 4)
    packed = WQLinear_GEMM.from_linear(linear(weight), 4, GROUP, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
    parts = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    return parts, dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, GROUP).T


def gptq(bits):
    def pack(weight):
        scale, zero = limits(weight, bits)
        packed = QuantLinear(bits, GROUP, weight.shape[1], weight.shape[0], bias=False)
        packed.pack(linear(weight), scale.half(), zero.half(), None)
        parts = {key: getattr(packed, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
        return parts, packed(torch.eye(weight.shape[1], dtype=torch.float16)).T

    return pack


def nf4(nested):
    def pack(weight):
        layer = bitsandbytes.nn.Linear4bit(
            *weight.shape[::-1], bias=False, quant_type="nf4", compress_statistics=nested, quant_storage=torch.uint8
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
        )
        layer = layer.to("cpu")
        assert layer.weight.dtype == torch.uint8
        dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return dict(layer.state_dict()), dense

    return pack


def compressed(form, **arguments):
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=form, ignore=["lm_head"], quantization_status="compressed"
    )
    library = BaseCompressor.get_value_from_registry(form)

    def pack(weight):
        largest = {"int": 2 ** (arguments["num_bits"] - 1) - 1, "float": 448}[arguments["type"]]
        group = arguments.get("group_size") or weight.shape[1]
        rows = weight.float().reshape(len(weight), -1, group)
        scale = rows.abs().amax(-1) / largest
        state = {"weight": weight.float(), "weight_scale": scale}
        if not arguments.get("symmetric", True):
            state["weight_zero_point"] = torch.randint(-2, 2, scale.shape, dtype=torch.int8)
        packed = library.compress(state, scheme)
        return packed, library.decompress(packed, scheme)["weight"]

    return config.model_dump(mode="json"), pack


AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False, "desc_act": False, "checkpoint_format": "gptq"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
torch.manual_seed(0)
make("awq", torch.float16, AWQ, awq)
make("gptq4", torch.float16, {**GPTQ, "bits": 4}, gptq(4))
make("gptq8", torch.float16, {**GPTQ, "bits": 8}, gptq(8))
# rows of whole blocks: of others bitsandbytes' own CPU kernel takes the wrong ones
make("nf4", torch.bfloat16, BNB, nf4(False), size=64)
make("nf4-nested", torch.bfloat16, {**BNB, "bnb_4bit_use_double_quant": True}, nf4(True), size=64)
make("int4", torch.float32, *compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP))
make(
    "int4-zeros",
    torch.float32,
    *compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
)
make("int8", torch.float32, *compressed("int-quantized", num_bits=8, type="int", strategy="channel"))
make("float8", torch.float32, *compressed("float-quantized", num_bits=8, type="float", strategy="channel"))
