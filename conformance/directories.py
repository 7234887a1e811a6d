"""`python -m conformance.directories --transformers4 PYTHON ...`: what we write is a model and tokenizer elsewhere.

Each PYTHON is an interpreter as `conformance.exchange` takes it. Every directory that we write, by a backend's
`save_pretrained`, by `convert` and by a tokenizer's `save_pretrained`, is loaded there by AutoTokenizer and by the auto
class of each framework, and `model.generate(**tokenizer(text, return_tensors=...))` gives the tokens that the float64
reference gives after the ids of our tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_core import backend
from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.reference import heads
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights.checkpoint import save
from mistral_core.weights.convert import convert
from mistral_core.weights.formats import FORMATS

from .exchange import CONFIG, run
from .weights import random_parameters

PEERS = {"transformers4": ("torch", "flax", "tf"), "transformers5": ("torch",)}
"""Peer -> the frameworks it has Mistral in."""
OWN = {"flax-msgpack": ("flax",), "tf-h5": ("tf",)}
"""The formats, beside Hugging Face's, that a framework of transformers 4 loads by itself."""
TEXTS = ("Hello", "The capital of France is", " two  spaces and\nlines", "déjà vu 🙂")
NEW = 6
"""How many tokens are generated."""


class Written(NamedTuple):
    """A directory of ours."""

    how: str
    frameworks: tuple[str, ...]
    """Those that load it."""
    write: Callable[[Path], None]


def save_pretrained(name: str, source: Path) -> Callable[[Path], None]:
    """What a backend writes, and the tokenizer beside it."""

    def write(folder: Path) -> None:
        backend.get(name).model_class("MistralForCausalLM").from_pretrained(source).save_pretrained(folder)
        MistralTokenizer.from_pretrained(source).save_pretrained(folder)

    return write


def converted(source: Path, *, through: str | None = None, to: str = "hf") -> Callable[[Path], None]:
    """What `convert` writes of a checkpoint, or of what it made of it before; the tokenizer travels along."""

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as between:
            first = Path(between) / "model"
            if through is not None:
                convert(source, first, to=through, allow_lossy=True)
            convert(source if through is None else first, folder, to=to, allow_lossy=True)
            if not (folder / "tokenizer_config.json").exists():  # GGUF keeps it inside
                MistralTokenizer.from_pretrained(source if through is None else first).save_pretrained(folder)

    return write


def with_tokenizer(path: Path) -> Callable[[Path], None]:
    """A model for a tokenizer's file of another kind, and what that tokenizer saves."""

    def write(folder: Path) -> None:
        tokenizer = MistralTokenizer.from_pretrained(path)
        save(folder, *small_model(tokenizer.vocab_size))
        tokenizer.save_pretrained(folder)

    return write


def small_model(vocab_size: int) -> tuple[MistralConfig, Iterator[tuple[str, np.ndarray]]]:
    """A model that every peer computes rightly, with random weights for a vocabulary."""
    config = CONFIG.replace(vocab_size=vocab_size)
    return config, iter(random_parameters(config, "MistralForCausalLM").items())


def written(source: Path) -> Iterator[Written]:
    """Every way to write a directory; `source` holds a model and a tokenizer in Hugging Face's format."""
    every = PEERS["transformers4"]
    for name in backend.installed():
        yield Written(f"mistral_{name}: save_pretrained", every, save_pretrained(name, source))
    yield Written("convert --to hf", every, converted(source))
    for row in FORMATS.values():
        if row.written and row.name != "hf":
            yield Written(f"convert --to {row.name}, then --to hf", every, converted(source, through=row.name))
    for format, frameworks in OWN.items():
        yield Written(f"convert --to {format}", frameworks, converted(source, to=format))
    yield Written(
        "mistral_torch: save_pretrained of the tiny model", ("torch",), save_pretrained("torch", TINY_CHECKPOINT)
    )
    found = importlib.util.find_spec("mistral_common")
    for path in sorted((Path(found.origin).parent / "data").iterdir() if found and found.origin else ()):
        if path.name.startswith(("tokenizer.model", "mistral_instruct_tokenizer", "tekken")):
            yield Written(f"tokenizer of {path.name}: save_pretrained", ("torch",), with_tokenizer(path))


def expected(folder: Path) -> list[list[int]]:
    """For each text the ids of our tokenizer and the reference's tokens after them, up to the end of sequence."""
    from mistral_core.weights import pretrained

    tokenizer = MistralTokenizer.from_pretrained(folder)
    loaded = pretrained.load(folder, "MistralForCausalLM")
    weights = dict(loaded.tensors)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        tokens = heads.greedy(loaded.config, weights, np.array([ids]), max_new_tokens=NEW)[0].tolist()
        rows.append(ids + until(tokens, loaded.config.eos_token_id))
    return rows


def until(tokens: list[int], end: object) -> list[int]:
    """Tokens up to the end of sequence, itself included."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def results(python: str, peer: str, each: Written, folder: Path) -> Iterator[tuple[str, str, str, str, bool]]:
    """One row for each framework: peer, how it was written, framework, what came of it, whether it is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each.write(folder / "model")
        wanted = expected(folder / "model")
    texts, out = folder / "texts.json", folder / "out.json"
    texts.write_text(json.dumps({"texts": TEXTS, "new": NEW}))
    for framework in each.frameworks:
        if framework not in PEERS[peer]:
            continue
        failed = run(python, peer, "run", framework, folder / "model", texts, out)
        if failed:
            yield (peer, each.how, framework, *failed)
            continue
        found = json.loads(out.read_text())
        equal = sum(row == tokens for row, tokens in zip(found, wanted, strict=True))
        yield peer, each.how, framework, f"{equal} of {len(wanted)} texts: equal ids and tokens", equal == len(wanted)


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.directories", description=(__doc__ or "").splitlines()[0])
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out what is written in another way")
    options = vars(parser.parse_args(argv))
    only = options.pop("only")
    asked = {peer: python for peer, python in options.items() if python}
    if not asked:
        parser.error(f"give one interpreter at least: {', '.join(PEERS)}")
    passed = True
    print("| library | written by | framework | result | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as source:
        tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
        save(Path(source) / "hf", *small_model(tokenizer.vocab_size))
        tokenizer.save_pretrained(Path(source) / "hf")
        for each in written(Path(source) / "hf"):
            for peer, python in asked.items() if only in each.how else ():
                with tempfile.TemporaryDirectory() as folder:
                    for row in results(python, peer, each, Path(folder)):
                        print(f"| {' | '.join(row[:4])} | {'yes' if row[4] else '**no**'} |", flush=True)
                        passed &= row[4]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
