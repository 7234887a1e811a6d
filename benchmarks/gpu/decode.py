"""Generating text with random weights made on the device: ours in PyTorch and Flax, or transformers' own.

Options: program (torch, flax, transformers), compile, and weights: bfloat16, or a scheme whose codes are random too.
transformers has its best settings: a static cache, whose step it compiles itself on a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common import prompt_ids, streamed, task
from mistral_core import MistralConfig
from mistral_core.parameters import parameters, shape_of
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import Quantization

from .device import CPU, flax_weights, peak, tell, torch_weights

ARCHITECTURE = "MistralForCausalLM"


def ours(program: str, config: MistralConfig, device: str) -> Any:
    """Our model with random weights."""
    if program == "torch":
        import torch

        from mistral_torch import MistralForCausalLM

        with torch.device("meta"):
            model = MistralForCausalLM(config)
        return torch_weights(model, device)
    from flax import nnx

    from mistral_flax import MistralForCausalLM

    return flax_weights(nnx.eval_shape(lambda: MistralForCausalLM(config, dtype="bfloat16")))


def packed(program: str, model: Any, config: MistralConfig, weights: str) -> Any:
    """The same model, with a matrix of random codes in the place of each that a scheme packs."""
    asked = Quantization(weights, head="int8").resolved(config, ARCHITECTURE)
    guest, rng = importlib.import_module(f"mistral_{program}.quantize"), np.random.default_rng(0)
    shapes = {name: shape_of(row, config) for name, row in parameters(config)}
    for name in asked.matrices(config, ARCHITECTURE):
        guest.put(model, name, random_codes(asked, name, shapes[name], rng))
    return model


def random_codes(asked: Quantization, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> PackedMatrix:
    """A matrix [O, I] of int8 or int4 whose every code is as likely."""
    kind, group, _ = asked.of(name, shape[1])
    rows, columns = shape
    codes = np.frombuffer(rng.bytes(rows * (columns if kind == "int8" else -(-columns // 2))), np.uint8)
    codes = codes.view(np.int8) if kind == "int8" else codes
    scale = np.full((rows, math.ceil(columns / group)), 2.0**-13 if kind == "int8" else 2.0**-9, ml_dtypes.bfloat16)
    return PackedMatrix(kind, codes.reshape(rows, -1).copy(), scale, None, (rows, columns), (1, group))


def generator_of_ours(model: Any, asked: dict[str, Any]) -> Callable[[Any], Any]:
    """Our generate, greedy, to the last token."""
    ids, options = prompt_ids(asked), {"do_sample": False, "eos_token_id": None}
    how = asked["options"]["compile"]
    return lambda streamer: model.generate(ids, max_new_tokens=asked["new"], compile=how, streamer=streamer, **options)


def generator_of_transformers(asked: dict[str, Any], device: str) -> Callable[[Any], Any]:
    """transformers' generate, greedy, to the last token."""
    import torch
    import transformers

    config = transformers.MistralConfig(**asked["sizes"], eos_token_id=None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = torch_weights(model, device)
    kind = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding
    model.model.rotary_emb = kind(config).to(device)  # its buffers have values
    ids = torch.from_numpy(prompt_ids(asked)).to(device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if asked["options"]["compile"] == "on":
        options["cache_implementation"] = "static"
    mask, new = torch.ones_like(ids), asked["new"]
    return lambda streamer: model.generate(ids, attention_mask=mask, max_new_tokens=new, streamer=streamer, **options)


def graphs_skipped() -> int | None:
    """How many compiled functions run without CUDA graphs though they were asked for; None without PyTorch's count."""
    try:
        from torch._dynamo.utils import counters
    except ImportError:
        return None
    return int(counters["inductor"]["cudagraph_skips"])


def main() -> None:
    asked = task()
    options, config = asked["options"], MistralConfig(**asked["sizes"])
    program, device = options["program"], asked["device"]
    if program == "transformers":
        generate = generator_of_transformers(asked, device)
    else:
        model = ours(program, config, device)
        if options["weights"] != "bfloat16":
            model = packed(program, model, config, options["weights"])
        generate = generator_of_ours(model, asked)
    result: dict[str, Any] = streamed(generate, asked["calls"])
    result["peak"] = peak("jax" if program == "flax" else "torch")
    if program != "flax" and device != CPU:
        result["graphs skipped"] = graphs_skipped()
    tell(**result)


if __name__ == "__main__":
    main()
