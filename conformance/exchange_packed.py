"""`python -m conformance.exchange_packed PYTHON`: packed models, exchanged with the libraries of their formats.

PYTHON is the interpreter of an environment with transformers 5.23, compressed-tensors 0.20, bitsandbytes 0.50 and
accelerate. For every packing a small random model is packed here and saved; the libraries give the numbers of its
matrices, which must be the specification's to the bit, and logits, which are compared with the float64 reference. Then
they pack the same floats and save them; what is read of that must be the specification's codes, scales, zero points.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mistral_core.arrays import Array
from mistral_core.quantization.matrix import PackedMatrix
from mistral_core.quantization.storage import arrangement_of
from mistral_core.reference import heads, quantized
from mistral_core.weights.checkpoint import save
from mistral_core.weights.loading import load_pretrained

from .cases import EVEN, LENGTHS, T, token_ids
from .exchange import BOUND, Exchange, run
from .packed import ARCHITECTURE, matrices
from .weights import random_parameters

# a window beyond the text
CONFIG = EVEN.replace(sliding_window=64, max_position_embeddings=2048)
PACKINGS = ("int8 row", "int8 32", "int4 32", "int4 asymmetric", "nf4 64", "nf4 doubled")
PEER = "quantized"
NESTED = 2e-2
"""How far a doubled scale may be from ours, over the largest: a code next to it, for the library looks codes up."""


def exchanges(python: str, packing: str, folder: Path) -> Iterator[Exchange]:
    """Our file read by the libraries, then the libraries' file read by us."""
    floats = random_parameters(CONFIG, ARCHITECTURE)
    packed = matrices(packing, CONFIG, floats)
    stream = ((name, packed.get(name, array)) for name, array in floats.items())
    save(folder / "ours", CONFIG, stream, packed={name: arrangement_of(matrix) for name, matrix in packed.items()})
    ids = token_ids(CONFIG, shape=(len(LENGTHS), T))
    np.save(folder / "ids.npy", ids)
    called = run(python, PEER, "read", packing, folder / "ours", folder / "ids.npy", folder / "out.npz")
    found = called or compared(folder / "out.npz", floats, packed, ids)
    yield Exchange(PEER, packing, "mistral", "reads ours", *found)
    np.savez(folder / "weights.npz", allow_pickle=False, **floats)
    (folder / "config.json").write_text(CONFIG.replace(architectures=(ARCHITECTURE,)).to_json_string())
    theirs = folder / "theirs"
    called = run(python, PEER, "write", packing, folder / "weights.npz", folder / "config.json", theirs)
    found = called or read_back(theirs, floats, packed)
    yield Exchange(PEER, packing, "mistral", "writes for us", *found)


def compared(
    path: Path, floats: Mapping[str, Array], packed: Mapping[str, PackedMatrix], ids: Array
) -> tuple[str, bool]:
    """Logits within float32's rounding of the reference, the numbers of every matrix bit for bit."""
    wanted = heads.causal_lm(CONFIG, quantized.parameters(floats, packed), ids).logits
    assert wanted is not None
    with np.load(path) as found:
        distance = float(np.abs(found["logits"] - wanted).max() / np.abs(wanted).max())
        given = {name: found[f"tensor:{name}"] for name in packed if f"tensor:{name}" in found.files}
    equal = [
        np.array_equal(array, quantized.dequantised(packed[name]).astype(np.float32)) for name, array in given.items()
    ]
    text = f"logits {distance / np.finfo(np.float32).eps:.1f} ulp, {sum(equal)} of {len(packed)} matrices bit-equal"
    return text, bool(distance < BOUND) and len(equal) == len(packed) and all(equal)


def read_back(path: Path, floats: Mapping[str, Array], packed: Mapping[str, PackedMatrix]) -> tuple[str, bool]:
    """Every tensor of what the libraries saved: floats bit for bit, matrices by code, scale and zero point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = load_pretrained(path, ARCHITECTURE).weights
        found = {weight.name: weight.matrix() if weight.name in packed else weight.read() for weight in weights}
    equal = {name: _same(found[name], packed.get(name, array)) for name, array in floats.items()}
    different = [name for name, is_same in equal.items() if not is_same]
    text = f"{len(equal) - len(different)} of {len(equal)} tensors equal"
    return text + (f", not {different[0]}" if different else ""), not different


def _same(found: Array | PackedMatrix | None, wanted: Array | PackedMatrix) -> bool:
    if not isinstance(wanted, PackedMatrix):
        return isinstance(found, np.ndarray) and np.array_equal(found, wanted)
    if not isinstance(found, PackedMatrix) or (found.kind, found.block) != (wanted.kind, wanted.block):
        return False
    scale = np.array_equal(found.scale, wanted.scale)
    if wanted.kind == "nf4" and not scale:
        scale = bool(np.abs(found.scale - wanted.scale).max() <= NESTED * wanted.scale.max())
    codes = np.array_equal(quantized.unsigned_codes(found), quantized.unsigned_codes(wanted))
    zero = found.zero is None if wanted.zero is None else np.array_equal(np.asarray(found.zero), wanted.zero)
    return codes and scale and zero


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.exchange_packed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("python", metavar="PYTHON")
    python, passed = parser.parse_args(argv).python, True
    print("| packing | direction | result | |\n|---|---|---|---|")
    for packing in PACKINGS:
        with tempfile.TemporaryDirectory() as folder:
            for exchange in exchanges(python, packing, Path(folder)):
                row = exchange.format, exchange.direction, exchange.result, "yes" if exchange.passed else "**no**"
                print(f"| {' | '.join(row)} |", flush=True)
                passed &= exchange.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
