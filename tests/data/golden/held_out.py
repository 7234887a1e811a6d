"""Compare the reference and every backend with transformers in float64, on random configs of every model type.

    cd tests/data/golden && PYTHONPATH=../../.. python held_out.py [count of each type] [seed]

The configs are nobody's choice: sizes, heads, windows, scaling, tying, padding and positions are drawn. The oracle is
that of make_golden.py, with the contract's float32 angles; the bound is 32 float32 eps of the largest logit.
"""

from __future__ import annotations

import sys

import make_golden
import numpy as np
import torch
import transformers

from conformance import adapters
from conformance.weights import random_parameters
from mistral_core.config import MistralConfig
from mistral_core.reference import heads

TYPES = ("mistral", "ministral", "ministral3", "mistral3")
EPS = float(np.finfo(np.float32).eps)
BOUND = 32


def drawn(kind: str, random: np.random.Generator) -> MistralConfig:
    """A random config of a model type."""

    def one(*choices):
        return choices[int(random.integers(len(choices)))]

    key_value_heads, layers = one(1, 2, 3), one(1, 2, 3)
    fields = {
        "vocab_size": int(random.integers(20, 120)),
        "hidden_size": 4 * int(random.integers(6, 16)),
        "intermediate_size": int(random.integers(20, 90)),
        "num_hidden_layers": layers,
        "num_key_value_heads": key_value_heads,
        "num_attention_heads": key_value_heads * one(1, 2, 4),
        "head_dim": one(8, 12, 16),
        "rms_norm_eps": one(1e-5, 1e-6, 1e-3),
        "rope_theta": one(1e4, 1e6, 1e8),
        "tie_word_embeddings": one(True, False),
        "sliding_window": one(None, 3, 7),
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "num_labels": 3,
    }
    if kind == "ministral":
        fields |= {"sliding_window": one(3, 7), "model_type": kind}
        fields["layer_types"] = tuple(one("full_attention", "sliding_attention") for _ in range(layers))
    if kind == "ministral3" or (kind == "mistral3" and one(True, False)):
        original = int(random.integers(3, 12))
        fields |= {"model_type": "ministral3", "sliding_window": one(None, None, 5)}
        fields["rope_scaling"] = {
            "rope_type": "yarn", "factor": one(2.0, 16.0, 48.0), "original_max_position_embeddings": original,
            "beta_fast": one(4.0, 32.0), "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": one(0.0, 1.0),
            "llama_4_scaling_beta": one(0.0, 0.1, 0.2),
        }  # fmt: skip
    if kind == "mistral3":
        whole = {**make_golden.TIED, "tie_word_embeddings": fields["tie_word_embeddings"]}
        fields["extra"] = {"mistral3": whole}
    return MistralConfig(**fields)


def inputs_of(config: MistralConfig, random: np.random.Generator) -> dict[str, np.ndarray]:
    """A batch with padding on the left or nowhere, or with positions far beyond any length."""
    T = int(random.integers(5, 40))
    ids = random.integers(1, config.vocab_size, (3, T))
    lengths = random.integers(2, T + 1, 3) if random.random() < 0.5 else np.full(3, T)
    mask = (np.arange(T) >= T - lengths[:, None]).astype(np.int64)
    batch = {"input_ids": np.where(mask != 0, ids, 0), "attention_mask": mask}
    if mask.all() and random.random() < 0.5:
        batch["position_ids"] = np.cumsum(random.integers(1, 30, (3, T)), axis=1)
    return batch


def oracle(config: MistralConfig, parameters: dict[str, np.ndarray], batch: dict[str, np.ndarray]) -> np.ndarray:
    """transformers' logits in float64, with the contract's angles."""
    torch.set_default_dtype(torch.float64)
    model = make_golden.build(config, "MistralForCausalLM", parameters)
    make_golden.contract_angles(model)
    logits = make_golden.run_oracle(model, batch)["logits"]
    torch.set_default_dtype(torch.float32)
    return logits


def main(count: int = 10, seed: int = 0) -> None:
    """Print the worst of each type and subject in eps; exit with 1 where one is beyond the bound."""
    transformers.logging.set_verbosity_error()
    make_golden.patch()
    random = np.random.default_rng(seed)
    worst: dict[tuple[str, str], float] = {}
    for kind in TYPES * count:
        config, architecture = drawn(kind, random), "MistralForCausalLM"
        parameters = random_parameters(config, architecture, seed=int(random.integers(1 << 30)))
        batch = inputs_of(config, random)
        expected, real = oracle(config, parameters, batch), batch["attention_mask"] != 0
        found = {"reference": heads.causal_lm(config, parameters, **batch).logits}
        for name in adapters.NAMES:
            adapter = adapters.get(name)
            model = adapter.model(architecture, config, parameters, dtype="float32", implementation="eager")
            found[name] = adapter.numpy(adapter.call(model, **batch).logits)
        for name, logits in found.items():
            distance = np.abs(np.asarray(logits)[real] - expected[real]).max() / (EPS * np.abs(expected[real]).max())
            worst[kind, name] = max(worst.get((kind, name), 0.0), float(distance))
    for (kind, name), distance in sorted(worst.items()):
        print(f"{kind:11} {name:10} {distance:8.3f} eps of float32 at most, of {count} configs")
    if max(worst.values()) > BOUND:
        sys.exit(f"beyond {BOUND} eps")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
