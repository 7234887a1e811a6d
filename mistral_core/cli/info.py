"""`mistral info PATH`: what a checkpoint, or a published size, is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config import MistralConfig
from ..config.presets import PRESETS
from ..errors import MistralError, UnsupportedFeatureError
from ..native import library
from ..parameters import HEADS, parameter_count
from ..text import sources
from ..text.tokenizer import MistralTokenizer
from ..weights import towers
from ..weights.opening import Checkpoint
from ..weights.sources import resolve_checkpoint
from . import put

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="a checkpoint directory, a hub id, or the name of a published size")


def run(options: argparse.Namespace) -> int:
    """Print the facts of a path or a preset."""
    facts = describe(options.path)
    if options.json:
        put(json.dumps(facts, indent=1))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        put(f"{name.replace('_', ' '):{width}}  {_shown(value)}")
    return 0


def describe(path: str) -> dict[str, Any]:
    """Architecture, sizes, memory by dtype, window, files."""
    if path in PRESETS:
        return {"preset": path, **facts_of(PRESETS[path])}
    root = resolve_checkpoint(path)
    checkpoint = Checkpoint.open(root)
    directory = checkpoint.directory
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    files = {checkpoint.name_of(shard): shard.stat().st_size for shard in sorted(checkpoint.shards)}
    return {
        "path": str(root),
        "format": checkpoint.format,
        **facts_of(checkpoint.config),
        "stored_as": dtypes,
        "tensors": len(checkpoint.tensors),
        **_packed(checkpoint),
        **_left_out(checkpoint),
        "files": files,
        "manifest": (directory / "mistral_manifest.json").exists(),
        **_tokenizer(root, checkpoint.config.vocab_size),
    }


def _packed(checkpoint: Checkpoint) -> dict[str, Any]:
    """How matrices are packed and their bytes in the files, and by what a CPU multiplies; nothing where all are floats.

    Asking compiles the kernels, where that was not done before.
    """
    packed = [tensor.packed for tensor in checkpoint.tensors.values() if tensor.packed is not None]
    if not packed:
        return {}
    size = sum(each.nbytes for each in packed)
    kernels = "kernels in C" if library.available() else f"the frameworks' own operations: {library.why()}"
    return {
        "packed": {"scheme": ", ".join(checkpoint.schemes), "matrices": len(packed), "bytes": size},
        "computed_by": kernels,
    }


def _left_out(checkpoint: Checkpoint) -> dict[str, Any]:
    """How many tensors of other towers the files hold, which are not read."""
    counts = towers.counted(checkpoint.skipped, checkpoint.format)
    return {"not_read": counts} if counts else {}


def _tokenizer(root: Path, vocab_size: int) -> dict[str, Any]:
    """What its tokenizer is read from, and how conversations are written; or why it cannot be read."""
    try:
        name = next(name for name in sources.NAMES if name in sources.found_in(root))
        tokenizer = MistralTokenizer.from_pretrained(root)
    except MistralError as error:
        return {"tokenizer": None, "tokenizer_problem": str(error)}
    own, built_in = ", ".join(tokenizer.chat_templates) or None, tokenizer.version
    found = {"tokenizer": name, "tokens": len(tokenizer), "instruct_version": built_in, "chat_templates": own}
    if len(tokenizer) > vocab_size:
        problem = f"{len(tokenizer)} tokens, the model has {vocab_size}: take its own, or resize_token_embeddings"
        return {**found, "tokenizer_problem": problem}
    return found


def facts_of(config: MistralConfig) -> dict[str, Any]:
    """What a config says, and what follows from it; the cache in bfloat16, and in int8 with its scales."""
    architecture = (config.architectures or ("MistralForCausalLM",))[0]
    if architecture not in HEADS:
        raise UnsupportedFeatureError(
            f"architectures must be one of {', '.join(HEADS)}, got {architecture!r}; correct the config."
        )
    count = parameter_count(config, architecture)
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    token, coded = vectors * config.head_dim * 2, vectors * (config.head_dim + 4)
    windows = sorted({w for w in config.layer_windows if w is not None})
    return {
        "architecture": architecture,
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key/value, of {config.head_dim}",
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window if windows else None,
        "full_attention_layers": sum(w is None for w in config.layer_windows),
        "rope": config.rope_parameters,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters": count,
        "weight_bytes": {dtype: count * size for dtype, size in BYTES.items()},
        "cache_bytes_per_token": token,
        "cache_bytes_per_token_in_int8": coded,
        "cache_bytes_at_window": token * windows[0] if windows and None not in config.layer_windows else None,
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value))
        if not isinstance(value, float)
        else f"{value:g}"
    )
