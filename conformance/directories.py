"""`python -m conformance.directories --transformers4 PYTHON ...`: what we write is a model and tokenizer elsewhere.

Each PYTHON is an interpreter as `conformance.exchange` takes it. Every directory that we write, by a backend's
`save_pretrained`, by `convert` and by a tokenizer's `save_pretrained`, is loaded there by AutoTokenizer and by the auto
class of each framework, and `model.generate(**tokenizer(text, return_tensors=...))` gives the tokens that the float64
reference gives after the ids of our tokenizer, of the same logits. The table says of how many texts the tokens are
equal, and how far the logits are apart, in units of float32's eps and relative to the largest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_core import backend
from mistral_core.config import MistralConfig
from mistral_core.data import TINY_CHECKPOINT
from mistral_core.reference import heads
from mistral_core.text.tokenizer import MistralTokenizer
from mistral_core.weights.checkpoint import save
from mistral_core.weights.convert import convert
from mistral_core.weights.formats import FORMATS

from .exchange import BOUND, CONFIG, run
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


def save_pretrained(name: str, source: Path, **options: Any) -> Callable[[Path], None]:
    """What a backend writes, and the tokenizer beside it."""

    def write(folder: Path) -> None:
        backend.get(name).model_class("MistralForCausalLM").from_pretrained(source).save_pretrained(folder, **options)
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

    return write


def converted_alone(source: Path) -> Callable[[Path], None]:
    """What `convert` writes of a GGUF file that nothing lies beside: the tokenizer is in the file."""

    def write(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as between:
            convert(source, Path(between) / "model", to="gguf", allow_lossy=True)
            alone = (Path(between) / "model" / "model.gguf").rename(Path(between) / "model.gguf")
            convert(alone, folder, to="hf")

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
    yield Written("convert --to gguf, then that file alone --to hf", every, converted_alone(source))
    for format, frameworks in OWN.items():
        yield Written(f"convert --to {format}", frameworks, converted(source, to=format))
    shards = save_pretrained("torch", source, max_shard_size="50KB")
    yield Written("mistral_torch: save_pretrained, in shards", ("torch", "tf"), shards)  # its Flax reads none
    yield Written(
        "mistral_torch: save_pretrained of the tiny model", ("torch",), save_pretrained("torch", TINY_CHECKPOINT)
    )
    found = importlib.util.find_spec("mistral_common")
    for path in sorted((Path(found.origin).parent / "data").iterdir() if found and found.origin else ()):
        if path.name.startswith(("tokenizer.model", "mistral_instruct_tokenizer", "tekken")):
            yield Written(f"tokenizer of {path.name}: save_pretrained", ("torch",), with_tokenizer(path))


class Wanted(NamedTuple):
    """What comes of one text."""

    tokens: list[int]
    """The ids of our tokenizer and the reference's tokens after them, up to the end of sequence."""
    logits: np.ndarray
    """The reference's after the last id: [V]."""


def expected(folder: Path) -> list[Wanted]:
    """What our tokenizer and the float64 reference make of each text from the files of a directory."""
    from mistral_core.weights import loading

    tokenizer = MistralTokenizer.from_pretrained(folder)
    loaded = loading.load_pretrained(folder, "MistralForCausalLM")
    weights = dict(loaded.tensors)
    rows = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        given = np.array([ids])
        tokens = heads.greedy(loaded.config, weights, given, max_new_tokens=NEW)[0].tolist()
        logits = heads.causal_lm(loaded.config, weights, given).logits
        assert logits is not None
        rows.append(Wanted(ids + until(tokens, loaded.config.eos_token_id), logits[0, -1]))
    return rows


def until(tokens: list[int], end: object) -> list[int]:
    """Tokens up to the end of sequence, itself included."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class Cell(NamedTuple):
    """What a framework made of a directory."""

    text: str
    passed: bool


def column(python: str, peer: str, framework: str, folders: Mapping[str, Path], out: Path) -> str:
    """Have a framework run directories, one after the other; returns its versions.

    What it finds in each goes below `out`, into a file of the directory's key. Raises RuntimeError where it does not
    begin.
    """
    out.mkdir()
    job = out / "job.json"
    job.write_text(
        json.dumps({"folders": {key: str(path) for key, path in folders.items()}, "texts": TEXTS, "new": NEW})
    )
    failed = run(python, peer, "run", framework, job, out)
    if not (out / "versions.json").exists():
        raise RuntimeError(f"{peer}, {framework}: {failed and failed[0]}")
    versions: dict[str, str] = json.loads((out / "versions.json").read_text())
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |difference| / max |wanted|; NaN where one is, infinite where there are more or fewer."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max()) if found.shape == wanted.shape else np.inf


def cell(path: Path, wanted: Sequence[Wanted]) -> Cell:
    """What a framework found in one directory, beside what it had to find."""
    if not path.exists():
        return Cell("the process ended before it", False)
    with np.load(path) as found:
        if "error" in found:
            return Cell(str(found["error"]), False)
        equal = sum(np.array_equal(found[f"tokens:{at}"], row.tokens) for at, row in enumerate(wanted))
        distance = float(np.max([apart(found[f"logits:{at}"], row.logits) for at, row in enumerate(wanted)]))
    text = f"{equal} of {len(wanted)}, {distance / np.finfo(np.float32).eps:.1f} ulp"
    return Cell(text, equal == len(wanted) and bool(distance < BOUND))


def table(columns: Sequence[str], rows: Mapping[str, Sequence[Cell | None]]) -> str:
    """Markdown: a row for each way to write a directory, a column for each framework; then how many are right."""
    lines = [f"| written by | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for how, cells in rows.items():
        texts = ["" if each is None else each.text if each.passed else f"**{each.text}**" for each in cells]
        lines.append(f"| {how} | {' | '.join(texts)} |")
    every = [each for cells in rows.values() for each in cells if each is not None]
    lines += ["", f"{sum(each.passed for each in every)} of {len(every)} are right."]
    return "\n".join(lines)


def source(folder: Path) -> Path:
    """A model and a tokenizer in Hugging Face's format."""
    tokenizer = MistralTokenizer.from_pretrained(TINY_CHECKPOINT)
    save(folder, *small_model(tokenizer.vocab_size))
    tokenizer.save_pretrained(folder)
    return folder


def compared(
    asked: Sequence[tuple[str, str, str]], ways: Sequence[Written], root: Path
) -> tuple[list[str], dict[str, list[Cell | None]]]:
    """The table's columns and rows: every directory, written once, is run by each (interpreter, peer, framework)."""
    folders = {str(at): root / str(at) for at in range(len(ways))}
    wanted = {}
    for (key, folder), each in zip(folders.items(), ways, strict=True):
        print(f"conformance.directories: {each.how}", file=sys.stderr, flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.write(folder)
            wanted[key] = expected(folder)
    columns: list[str] = []
    rows: dict[str, list[Cell | None]] = {each.how: [] for each in ways}
    for python, peer, framework in asked:
        print(f"conformance.directories: {peer}, {framework}", file=sys.stderr, flush=True)
        its = {
            key: folder
            for (key, folder), each in zip(folders.items(), ways, strict=True)
            if framework in each.frameworks
        }
        out = root / f"{peer}-{framework}"
        columns.append(column(python, peer, framework, its, out))
        for key, each in zip(folders, ways, strict=True):
            rows[each.how].append(cell(out / f"{key}.npz", wanted[key]) if key in its else None)
    return columns, rows


def main(argv: list[str] | None = None) -> int:
    """Print a Markdown table; 0 where everything passed."""
    parser = argparse.ArgumentParser(prog="conformance.directories", description=(__doc__ or "").splitlines()[0])
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out what is written in another way")
    options = vars(parser.parse_args(argv))
    only = options.pop("only")
    asked = [(python, peer, name) for peer, python in options.items() if python for name in PEERS[peer]]
    if not asked:
        parser.error(f"give one interpreter at least: {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as root:
        ways = [each for each in written(source(Path(root) / "source")) if only in each.how]
        columns, rows = compared(asked, ways, Path(root))
    print(table(columns, rows))
    return 0 if all(each is None or each.passed for cells in rows.values() for each in cells) else 1


if __name__ == "__main__":
    sys.exit(main())
