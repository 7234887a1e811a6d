"""Checkpoints to convert: every bit pattern that must survive, every shape that has a trap."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

from mistral_core import TINY, MistralConfig
from mistral_core.parameters import parameters, shape_of
from mistral_core.weights import manifest
from mistral_core.weights.containers.safetensors import SafetensorsFile
from mistral_core.weights.containers.tensor_file import CODES, DTYPES, PACKED
from mistral_core.weights.formats.base import Outline
from mistral_core.weights.loading import dtype_of
from mistral_core.weights.opening import Checkpoint
from mistral_core.weights.writing import write_checkpoint

CAUSAL = "MistralForCausalLM"
LAYERS = TINY.num_hidden_layers
CONFIGS = {
    "tiny": TINY,
    "one key/value head": TINY.replace(num_key_value_heads=1),
    "as many key/value heads as heads": TINY.replace(num_key_value_heads=TINY.num_attention_heads),
    "head_dim of hidden/heads": TINY.replace(head_dim=TINY.hidden_size // TINY.num_attention_heads)
    if TINY.hidden_size % TINY.num_attention_heads == 0
    else TINY.replace(hidden_size=8 * TINY.num_attention_heads, head_dim=8),
    "square projections": TINY.replace(hidden_size=TINY.num_attention_heads * TINY.head_dim),
    "tied": TINY.replace(tie_word_embeddings=True),
    "no window": TINY.replace(sliding_window=None),
    "scaled queries": TINY.replace(
        model_type="ministral3",
        sliding_window=None,
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0,
            "beta_slow": 1.0, "attention_factor": 1.0, "llama_4_scaling_beta": 0.25,
        },
    ),
    "windows by layer": TINY.replace(
        layer_types=tuple("full_attention" if i % 2 else "sliding_attention" for i in range(LAYERS))
    ),
    "one layer, odd sizes": TINY.replace(
        num_hidden_layers=1, vocab_size=101, intermediate_size=77, hidden_size=35, num_attention_heads=5,
        num_key_value_heads=5, head_dim=6,
    ),
    "yarn": TINY.replace(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
}  # fmt: skip
"""Configs that somebody's converter got wrong."""
INEXPRESSIBLE = {
    "keras-hub": {"tied", "scaled queries", "windows by layer", "yarn"},
    "gguf": {"windows by layer"},
}
"""Those that a format cannot say, and is refused for."""


def any_bits(
    config: MistralConfig = TINY, dtype: str = "bfloat16", architecture: str = CAUSAL
) -> dict[str, np.ndarray]:
    """Canonical name -> array of arbitrary bits: NaNs with payloads, infinities, signed zeros, denormals among them."""
    kind = dtype_of(dtype)
    special = {2: [0x7FC1, 0xFFA5, 0x7F80, 0x8000, 0x0001, 0x7F7F], 4: [0x7FA00001, 0xFFC12345, 0x80000000, 1]}
    found = {}
    for name, row in parameters(config, architecture):
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        bits = np.frombuffer(generator.bytes(int(np.prod(shape_of(row, config))) * kind.itemsize), f"u{kind.itemsize}")
        bits = bits.copy()
        chosen = special.get(kind.itemsize, [])[: bits.size]
        bits[: len(chosen)] = chosen
        found[name] = bits.view(kind).reshape(shape_of(row, config))
    return found


def ordinary(config: MistralConfig = TINY, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Canonical name -> normal numbers, none of them NaN, infinite or denormal, all of them bfloat16s."""
    generator = np.random.Generator(np.random.PCG64(0))
    found = {}
    for name, row in parameters(config, CAUSAL):
        upper = generator.integers(0, 1 << 16, shape_of(row, config), np.uint32) & 0x83FF | 0x3C00
        found[name] = (upper << 16).view(np.float32).astype(dtype_of(dtype))
    return found


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def write(
    directory: Path,
    format: str,
    arrays: dict[str, np.ndarray],
    config: MistralConfig = TINY,
    *,
    architecture: str = CAUSAL,
    texts: dict[str, bytes] | None = None,
    limit: int = 10**12,
) -> Path:
    """Write arrays as a checkpoint of a format, with a manifest that carries the config; every bit is read back."""
    directory.mkdir(parents=True)
    codes = {name: CODES[array.dtype] for name, array in arrays.items()}
    outline = Outline(config, architecture, codes, texts or {})
    description = write_checkpoint(directory, format, outline, arrays.items(), limit=limit)
    manifest.store(directory, {**description, "config": config.replace(architectures=(architecture,)).to_dict()})
    return directory


def store(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of any dtypes, in the order of the tensors."""
    codes = {dtype: code for code, dtype in {**DTYPES, **PACKED}.items()}
    header, data = {}, b""
    for name, array in tensors.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def stored(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file, whatever its dtypes."""
    file = SafetensorsFile(path)
    return {name: file.read_packed(name) for name in file.tensors}


def read(path: Path, format: str | None = None) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    checkpoint = Checkpoint.open(path, format=format)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert bits(found[name]) == bits(array), name
