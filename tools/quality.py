"""What packing costs the embedded checkpoint, and what calibration gives back: `python tools/quality.py austen.txt`.

The text is the one that `tools/train_tiny.py` names; that file cuts it into what was trained on and what was not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import train_tiny
from tokenizers import Tokenizer

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.quantization import calibration, report
from mistral_core.quantization.request import Quantization
from mistral_core.weights import lazy
from mistral_core.weights.opening import Checkpoint

SCHEMES = {
    "int8, a row": Quantization("int8"),
    "int4, groups of 16": Quantization("int4", 16, head="off"),
    "int4, groups of 16, asymmetric": Quantization("int4", 16, symmetric=False, head="off"),
    "int4, a row": Quantization("int4", -1, head="off"),
    "int4, a row, asymmetric": Quantization("int4", -1, symmetric=False, head="off"),
    "nf4, blocks of 16": Quantization("nf4", 16),
}
HELD_OUT, SAMPLES = (16, 1024), 3
"""Texts and tokens of each that are reported on, and how many times 64 texts of 256 tokens are calibrated on."""


def main() -> None:
    checkpoint = Checkpoint.open(TINY_CHECKPOINT)
    config, parameters = checkpoint.config, lazy.arrays(checkpoint)
    tokenizer = Tokenizer.from_file(str(TINY_CHECKPOINT / "tokenizer.json"))
    chapters = train_tiny.read_chapters(Path(sys.argv[1]))
    unseen = train_tiny.Passages(chapters[29::30], tokenizer).tokens[: HELD_OUT[0] * HELD_OUT[1]].reshape(HELD_OUT)
    passages = train_tiny.Passages([text for i, text in enumerate(chapters) if i % 30 != 29], tokenizer)
    seen = [passages.sample(np.random.default_rng(seed), 64, 256).numpy() for seed in range(SAMPLES)]
    print("| scheme | loss | KL (least, largest) | another likeliest token |\n|---|---|---|---|")
    for name, asked in SCHEMES.items():
        asked = asked.resolved(config, "MistralForCausalLM")
        nearest = {
            each: asked.quantise(each, parameters[each]) for each in asked.matrices(config, "MistralForCausalLM")
        }
        calibrated = [dict(calibration.packed(config, parameters, ids, asked)) for ids in seen]
        for way, several in (("nearest", [nearest]), ("GPTQ", calibrated)):
            found = [report.quality(config, parameters, packed, unseen) for packed in several]
            kl = [each.kl for each in found]
            loss = np.mean([each.packed_loss - each.loss for each in found])
            changed = np.mean([each.changed for each in found])
            print(f"| {name}, {way} | {loss:+.4f} | {np.mean(kl):.5f} ({min(kl):.5f}, {max(kl):.5f}) | {changed:.1%} |")
    print(f"\nloss in floats {found[0].loss:.4f}")


if __name__ == "__main__":
    main()
