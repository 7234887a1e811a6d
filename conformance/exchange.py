"""`python -m conformance.exchange --transformers4 PYTHON ...`: foreign libraries load ours and write for us.

Each PYTHON is the interpreter of another environment: transformers 4.56.2 with torch, flax 0.10.7, jax 0.6 and
tensorflow 2.19; transformers 5 with torch; keras-hub; llama-cpp-python with gguf. For every format that one of them
reads, a small random model is converted to it, the library computes logits, which are compared with the float64
reference, and gives its tensors, which must be bit-equal; then the library saves the model its own way and we read it.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_core.config import MistralConfig, rope
from mistral_core.config.presets import TINY
from mistral_core.reference import heads
from mistral_core.weights.checkpoint import save
from mistral_core.weights.convert import convert
from mistral_core.weights.matching import canonical_names
from mistral_core.weights.opening import Checkpoint

from .cases import LENGTHS, T, token_ids
from .weights import random_parameters


class Exchanged(NamedTuple):
    """A model to exchange."""

    config: MistralConfig
    length: int
    """Of the texts whose logits are compared."""


# a head_dim of hidden/heads, a window beyond the text: what every one of these libraries computes rightly
CONFIG = TINY.replace(head_dim=8, rope_theta=1e4, sliding_window=64, max_position_embeddings=2048)
SCALED = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 0.5,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MODELS: Mapping[str, Exchanged] = {
    "mistral": Exchanged(CONFIG, T),
    # so long that queries are scaled by more than one number
    "ministral3": Exchanged(
        CONFIG.replace(model_type="ministral3", rope_scaling=SCALED, sliding_window=None, max_position_embeddings=512),
        5 * 32,
    ),
}
"""Model type -> what is exchanged of it."""
KNOWN: Mapping[str, tuple[str, ...]] = {"llama": ("mistral", "ministral3")}
"""Peer -> the model types that it is asked for, where that is not mistral alone."""
PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers4": ("hf", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors"),
    "transformers5": ("hf",),
    "keras_hub": ("keras-hub",),
    "llama": ("gguf",),
}
"""Peer, whose script is adapters/exchange_<peer>.py -> the formats it knows."""
BOUND = 32 * np.finfo(np.float32).eps
"""Relative to the largest logit, as the conformance suite has it for float32."""


class Exchange(NamedTuple):
    """What became of one model in one direction."""

    peer: str
    format: str
    model_type: str
    direction: str
    result: str
    passed: bool


def exchanges(python: str, peer: str, format: str, model_type: str, folder: Path) -> Iterator[Exchange]:
    """Our files read by the library, then the library's files read by us."""
    config, length = MODELS[model_type]
    weights = random_parameters(config, "MistralForCausalLM")
    save(folder / "hf", config, weights.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(folder / "hf", folder / "ours", to=format, allow_lossy=True)
    ids = token_ids(config, shape=(len(LENGTHS), length))
    np.save(folder / "ids.npy", ids)
    called = run(python, peer, "read", format, folder / "ours", folder / "ids.npy", folder / "out.npz")
    found = called or compare(folder / "out.npz", config, weights, ids)
    yield Exchange(peer, format, model_type, "reads ours", *found)
    np.savez(folder / "weights.npz", allow_pickle=False, **weights)
    (folder / "config.json").write_text(config.replace(architectures=("MistralForCausalLM",)).to_json_string())
    theirs = folder / "theirs"
    called = run(python, peer, "write", format, folder / "weights.npz", folder / "config.json", theirs)
    found = called or read_back(theirs, format, config, weights)
    yield Exchange(peer, format, model_type, "writes for us", *found)


def run(python: str, peer: str, *arguments: str | Path) -> tuple[str, bool] | None:
    """Call a peer's script; None where it succeeded, else its last words."""
    script = Path(__file__).parent / "adapters" / f"exchange_{peer}.py"
    # -P: beside the script lie adapters called torch.py and flax.py
    done = subprocess.run([python, "-P", str(script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no word"])[-1][:200], False


def compare(path: Path, config: MistralConfig, weights: Mapping[str, np.ndarray], ids: np.ndarray) -> tuple[str, bool]:
    """Logits within float32's rounding of the reference, tensors bit for bit."""
    wanted = heads.causal_lm(config, weights, ids).logits
    assert wanted is not None
    with np.load(path) as found:
        distance = float(np.abs(found["logits"] - wanted).max() / np.abs(wanted).max())
        given = {name.removeprefix("tensor:"): found[name] for name in found.files if name.startswith("tensor:")}
    equal = [np.array_equal(array.view(np.uint32), weights[name].view(np.uint32)) for name, array in given.items()]
    text = f"logits {distance / np.finfo(np.float32).eps:.1f} ulp, {sum(equal)} of {len(weights)} tensors bit-equal"
    return text, bool(distance < BOUND) and all(equal) and bool(equal)


def read_back(path: Path, format: str, config: MistralConfig, weights: Mapping[str, np.ndarray]) -> tuple[str, bool]:
    """Every tensor of what the library saved, bit for bit, and the same positions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = Checkpoint.open(path)
        names = canonical_names(checkpoint.tensors)
        equal = [
            name in names and np.array_equal(checkpoint.read(names[name]).view(np.uint32), array.view(np.uint32))
            for name, array in weights.items()
        ]
        found = checkpoint.config
    text = f"{sum(equal)} of {len(weights)} tensors bit-equal"
    text += "" if checkpoint.format == format else f", seen as {checkpoint.format}"
    same = rope.rotary_table(found) == rope.rotary_table(config) and (
        rope.query_scaling(found) == rope.query_scaling(config)
    )
    text += "" if same else ", other positions"
    return text, all(equal) and same and checkpoint.format == format


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.exchange", description=(__doc__ or "").splitlines()[0])
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('_', '-')}", dest=peer, metavar="PYTHON")
    options = vars(parser.parse_args(argv))
    asked = {peer: python for peer, python in options.items() if python}
    if not asked:
        parser.error(f"give one interpreter at least: {', '.join(PEERS)}")
    passed = True
    print("| library | format | model type | direction | result | |\n|---|---|---|---|---|---|")
    for peer, python in asked.items():
        for format, model_type in itertools.product(PEERS[peer], KNOWN.get(peer, ("mistral",))):
            with tempfile.TemporaryDirectory() as folder:
                for exchange in exchanges(python, peer, format, model_type, Path(folder)):
                    print(f"| {' | '.join(exchange[:5])} | {'yes' if exchange.passed else '**no**'} |", flush=True)
                    passed &= exchange.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
