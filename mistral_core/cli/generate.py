"""`mistral generate PATH "prompt"`: continue a prompt, shown as it comes."""

from __future__ import annotations

import argparse
import json
import logging
import time
from typing import Any

import numpy as np

from .. import backend as backends
from ..hub import download
from ..text.stream import TextStreamer
from ..text.tokenizer import MistralTokenizer
from . import backend_argument, loading, loading_arguments, progress, put, quantization_argument, stdin

OPTIONS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "num_beams": int,
    "prompt_lookup_num_tokens": int,
    "cache_dtype": str,
    "compile": str,
}
"""The options of `generate` that are options of the command too; those that sample turn sampling on."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
PROGRESS_SECONDS = 5.0
"""Seconds between two words of progress where no text is shown."""


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("path", help="a checkpoint directory or a hub id")
    command.add_argument("prompt", nargs="?", default="-", help="the text to continue; - or nothing reads stdin")
    model_arguments(command)


def model_arguments(command: argparse.ArgumentParser) -> None:
    """What every command takes that loads a model and writes text with it."""
    backend_argument(command)
    loading_arguments(command)
    quantization_argument(command)
    for name, kind in OPTIONS.items():
        sampling = "; turns sampling on" if name in SAMPLING else ""
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{kind.__name__}{sampling}")
    command.add_argument("--stop", action="append", dest="stop_strings", help="a text that ends it; may be repeated")


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `generate`, with sampling on where one of them means it."""
    given = {name: getattr(options, name) for name in (*OPTIONS, "stop_strings")}
    given = {name: value for name, value in given.items() if value is not None}
    return {**given, "do_sample": True} if any(name in given for name in SAMPLING) else given


def load(options: argparse.Namespace) -> tuple[backends.Backend, MistralTokenizer, Any]:
    """Backend, tokenizer and model that were asked for, with progress told; raises MissingExtraError."""
    _tell_what_takes_long()
    backend = backends.get(backends.chosen(options.backend))
    path = download.held(options.path)  # the tokenizer and the model are of one moment
    tokenizer = MistralTokenizer.from_pretrained(path)
    progress(f"loading {options.path} in {backends.version(backend)}")
    model = backend.model_class("MistralForCausalLM").from_pretrained(path, **loading(options))
    return backend, tokenizer, model


def run(options: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    prompt = stdin.read("prompt", "continue") if options.prompt == "-" else options.prompt
    backend, tokenizer, model = load(options)
    given = generation_options(options)
    ids = np.array([tokenizer.encode(prompt)])
    started = time.perf_counter()
    beams = options.num_beams not in (None, 1)
    shown = not options.json and not beams
    text = TextStreamer(tokenizer, stop_strings=options.stop_strings or ())
    streamer = text if shown else None if beams else _Count(ids.shape[1])
    row = backend.to_numpy(model.generate(ids, streamer=streamer, tokenizer=tokenizer, **given))[0]
    seconds = time.perf_counter() - started
    new = len(row) - ids.shape[1]
    progress(f"{new} tokens in {seconds:.1f} s, compilation included")
    if options.json:
        put(
            json.dumps(
                {
                    "text": tokenizer.decode(row, skip_special_tokens=True),
                    "ids": row.tolist(),
                    "new_tokens": new,
                    "seconds": seconds,
                }
            )
        )
    elif not shown:
        put(tokenizer.decode(row, skip_special_tokens=True))
    return 0


class _Count:
    """Says now and then how many tokens there are."""

    def __init__(self, prompt: int) -> None:
        self.made, self.said = -1, time.monotonic()
        progress(f"reading a prompt of {prompt} tokens")

    def put(self, value: Any) -> None:
        """The prompt first, then the tokens of each step."""
        self.made += 1
        if time.monotonic() - self.said > PROGRESS_SECONDS:
            self.said = time.monotonic()
            progress(f"{self.made} tokens")

    def end(self) -> None:
        """Nothing more comes."""


class _Progress(logging.Handler):
    """What the library reports of its work, as progress."""

    def emit(self, record: logging.LogRecord) -> None:
        progress(record.getMessage())


def _tell_what_takes_long() -> None:
    """Show what the driver and the backends log: compilation, and the pieces of a long prompt."""
    logger = logging.getLogger("mistral")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Progress) for handler in logger.handlers):
        logger.addHandler(_Progress())
