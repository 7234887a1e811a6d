"""`mistral generate PATH "prompt"`: continue a prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from .. import backend as backends
from ..errors import EmptyInputError, MissingExtraError
from ..text.tokenizer import MistralTokenizer
from . import progress


def run(options: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    prompt = options.prompt
    if prompt == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise EmptyInputError("prompt: nothing to continue; give it as an argument or through a pipe.")
        prompt = sys.stdin.read().rstrip("\n")
    name = options.backend or next(backends.installed(), None)
    if name is None:
        raise MissingExtraError("no framework is installed; pip install 'mistral-frameworks[torch]' (or flax, or tf).")
    backend = backends.get(name)
    tokenizer = MistralTokenizer.from_pretrained(options.path)
    progress(f"loading {options.path} in {backends.version(backend)}")
    model = backend.model_class("MistralForCausalLM").from_pretrained(options.path, dtype=options.dtype)
    given = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    started = time.perf_counter()
    ids = np.array([tokenizer.encode(prompt)])
    row = backend.to_numpy(model.generate(ids, **given))[0]
    seconds = time.perf_counter() - started
    new, text = len(row) - ids.shape[1], tokenizer.decode(row)
    progress(f"{new} tokens in {seconds:.1f} s, compilation included")
    if options.json:
        print(json.dumps({"text": text, "ids": row.tolist(), "new_tokens": new, "seconds": seconds}))
    else:
        print(text)
    return 0
