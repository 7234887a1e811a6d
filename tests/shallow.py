"""The first layer of the embedded checkpoint, for what is the same of one as of all: frameworks trace each."""

from __future__ import annotations

import shutil

from mistral_core.data import TINY_CHECKPOINT
from mistral_core.parameters import parameters
from mistral_core.weights import checkpoint, loading


def first_layer(directory: str) -> str:
    """The embedded checkpoint without the layers after the first, and its tokenizer, in a new directory."""
    loaded = loading.load_pretrained(TINY_CHECKPOINT, "MistralForCausalLM", dtype="float32")
    config = loaded.config.replace(num_hidden_layers=1)
    kept = {name for name, _ in parameters(config, "MistralForCausalLM")}
    checkpoint.save(directory, config, [(name, array) for name, array in loaded.tensors if name in kept])
    for path in TINY_CHECKPOINT.glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory
