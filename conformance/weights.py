"""Weights that make a small Mistral's outputs vary, drawn from a seed and their names.

Fresh weights (`initial_value`) give nearly uniform attention and logits near 0, in which a wrong window or a
wrong theta hides. These keep activations of order 1 in every layer, and no norm weight or bias is neutral.
"""

from __future__ import annotations

import zlib

import numpy as np

from mistral_core.config import MistralConfig
from mistral_core.parameters import parameters, shape_of

GAIN = 1.4
"""A matrix's entries are normal(0, GAIN / sqrt(inputs)), 0.2 for TINY's hidden size."""
EMBEDDING_STD = 0.5
NORM_STD = 0.3
BIAS_STD = 0.1


def random_parameters(
    config: MistralConfig, architecture: str = "MistralForCausalLM", *, seed: int = 0
) -> dict[str, np.ndarray]:
    """Full name -> float32 array of every tensor the model owns, drawn from `seed` and its name alone."""
    return {name: _drawn(name, row.kind, shape_of(row, config), seed) for name, row in parameters(config, architecture)}


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 over names and bytes: tells a changed generator from a changed model."""
    crc = 0
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def _drawn(name: str, kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    normal = generator.standard_normal(shape)
    if kind == "norm":
        return (1 + NORM_STD * normal).astype(np.float32)
    if name.endswith(".bias"):
        return (BIAS_STD * normal).astype(np.float32)
    if kind == "embedding":
        return (EMBEDDING_STD * normal).astype(np.float32)
    return (GAIN / np.sqrt(shape[-1]) * normal).astype(np.float32)
