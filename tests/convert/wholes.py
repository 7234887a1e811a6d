"""Checkpoints of models that also see, in each way of naming their tensors; the numbers are those of `samples`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from samples import any_bits, store, stored

from mistral_core import TINY, MistralConfig
from mistral_core.config import params_json
from mistral_core.parameters import layer_of, parameters
from mistral_core.weights import layouts

CONFIG = TINY.replace(num_hidden_layers=2, dtype="bfloat16")
_random = np.random.Generator(np.random.PCG64(1))


def _bits(*shape: int) -> np.ndarray:
    """Any bits of bfloat16, a NaN with a payload among them."""
    bits = _random.integers(0, 1 << 16, shape, np.uint16)
    bits.reshape(-1)[0] = 0x7FC1
    return bits.view(ml_dtypes.bfloat16)


VISION = {
    "vision_tower.patch_conv.weight": _bits(8, 3, 4, 4),
    "vision_tower.ln_pre.weight": np.float32([np.nan, 1, 2]),
    "vision_tower.transformer.layers.0.attention.q_proj.weight": _bits(8, 8),
    "multi_modal_projector.norm.weight": _bits(8),
    "multi_modal_projector.linear_1.weight": _bits(6, 8),
}
RAW_VISION = {
    "vision_encoder.patch_conv.weight": _bits(8, 3, 4, 4),
    "vision_encoder.transformer.layers.0.attention.wq.weight": _bits(8, 8),
    "vision_language_adapter.w_in.weight": _bits(8, 8),
    "patch_merger.merging_layer.weight": _bits(8, 32),
    "pre_mm_projector_norm.weight": _bits(8),
}
WHOLE = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "vision_config": {"model_type": "pixtral", "hidden_size": 8},
    "vision_feature_layer": -1,
}
VISION_ENCODER = {"hidden_size": 8, "image_token_id": 10, "mm_projector_id": "patch_merge"}


class Nesting(NamedTuple):
    """How a file names the two parts, and the class of the whole."""

    text: Callable[[str], str]
    vision: str
    architecture: str = "Mistral3ForConditionalGeneration"


def _in_memory(name: str) -> str:
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


NESTINGS = {
    "as transformers writes it": Nesting("language_model.{}".format, ""),
    "as transformers has it in memory": Nesting(_in_memory, "model."),
    "of the bare whole": Nesting("language_model.{}".format, "", "Mistral3Model"),
    "of the bare whole with a bare text part": Nesting(
        lambda name: f"language_model.{name.removeprefix('model.')}", "", "Mistral3Model"
    ),
}


def text(config: MistralConfig, nesting: Nesting = NESTINGS["as transformers writes it"]) -> dict[str, np.ndarray]:
    """Canonical name -> array of the text part."""
    bare = nesting.architecture == "Mistral3Model"
    return any_bits(config, architecture="MistralModel" if bare else "MistralForCausalLM")


def write(
    directory: Path,
    config: MistralConfig = CONFIG,
    nesting: Nesting = NESTINGS["as transformers writes it"],
    *,
    tensors: dict[str, np.ndarray] | None = None,
    **changes: object,
) -> dict[str, np.ndarray]:
    """Write a whole, its vision tower first in the file; gives the text part by canonical names, or `tensors` as given.

    `changes` are keys of its config.json; None removes one.
    """
    directory.mkdir(exist_ok=True)
    arrays = text(config, nesting) if tensors is None else tensors
    named = {nesting.text(name): array for name, array in arrays.items()} if tensors is None else tensors
    store(directory / "model.safetensors", {nesting.vision + name: each for name, each in VISION.items()} | named)
    data = {**WHOLE, "architectures": [nesting.architecture], "text_config": config.to_dict(), **changes}
    data = {key: value for key, value in data.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(data))
    return arrays


def write_raw(directory: Path, config: MistralConfig = CONFIG, **changes: object) -> dict[str, np.ndarray]:
    """The same of the raw format; `changes` are keys of its params.json."""
    directory.mkdir(exist_ok=True)
    arrays, rows = any_bits(config), dict(parameters(config))
    named = {
        row.raw.format(layer_of(name)): layouts.to_stored(arrays[name], row, config, layouts.rotary_pairs(row))
        for name, row in rows.items()
    }
    store(directory / "consolidated.safetensors", {**RAW_VISION, **named})
    params = {**params_json.write(config), "vision_encoder": VISION_ENCODER, **changes}
    params = {key: value for key, value in params.items() if value is not None}
    (directory / "params.json").write_text(json.dumps(params))
    return arrays


def in_shards(directory: Path, groups: Iterable[Iterable[str]]) -> list[Path]:
    """The one file of a checkpoint cut into shards that hold these tensors, with an index."""
    tensors, groups = stored(directory / "model.safetensors"), [list(group) for group in groups]
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        store(directory / name, {each: tensors[each] for each in group})
    weight_map = {each: name for name, group in zip(names, groups, strict=True) for each in group}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [directory / name for name in names]
