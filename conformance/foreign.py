"""`python -m conformance.foreign PYTHON`: how far transformers 4.56's three Mistrals are from the specification.

PYTHON is the interpreter of another environment with transformers 4.56.2, torch, flax 0.10.7, jax 0.6 and tensorflow
2.19. Prints a Markdown table of max |difference| / max |logit| on the same random weights; about 2e-6 is agreement in
float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mistral_core.arrays import Array
from mistral_core.config import MistralConfig
from mistral_core.config.presets import TINY
from mistral_core.reference import heads

from .cases import token_ids
from .weights import random_parameters

FRAMEWORKS = ("torch", "flax", "tf")
# a head_dim of hidden_size / heads: its Flax and TensorFlow load no other
PLAIN = TINY.replace(head_dim=8, rope_theta=1e4, sliding_window=64, max_position_embeddings=2048)
CASES = {
    "window larger than the text": PLAIN,
    "window 5": PLAIN.replace(sliding_window=5),
    "no window": PLAIN.replace(sliding_window=None),
    "theta 1e6": PLAIN.replace(rope_theta=1e6),
    "tied embeddings": PLAIN.replace(tie_word_embeddings=True),
    "linear rope scaling": PLAIN.replace(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "head_dim not hidden_size / heads": PLAIN.replace(head_dim=16),
}


def distances(python: str, config: MistralConfig) -> Iterator[str]:
    """One cell a framework: max |difference| / max |logit|, or that it does not load."""
    ids, parameters = token_ids(config), random_parameters(config, "MistralForCausalLM")
    expected = heads.causal_lm(config, parameters, ids).logits
    assert expected is not None
    given: dict[str, Array] = {"config": np.array(config.to_json_string()), "input_ids": ids, **parameters}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        with source.open("wb") as file:
            np.savez(file, allow_pickle=False, **given)
        script = Path(__file__).parent / "adapters" / "transformers4.py"
        # -P: beside the script lie adapters called torch.py and flax.py
        subprocess.run([python, "-P", str(script), str(source), str(target)], check=True, stderr=subprocess.DEVNULL)
        with np.load(target) as found:
            for name in FRAMEWORKS:
                if name not in found:
                    print(f"conformance.foreign: {name}: {found[f'{name}_error']}", file=sys.stderr)
                    yield "does not load"
                    continue
                distance = np.abs(found[name] - expected).max() / np.abs(expected).max()
                yield f"{distance:.0e}" if distance < 1e-4 else f"**{distance:.2f}**"


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 where it could be made."""
    parser = argparse.ArgumentParser(prog="conformance.foreign", description=__doc__)
    parser.add_argument("python", help="the interpreter of the other environment")
    python = parser.parse_args(argv).python
    print("| case | its torch | its Flax | its TensorFlow |\n|---|---|---|---|")
    for name, config in CASES.items():
        print(f"| {name} | {' | '.join(distances(python, config))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
