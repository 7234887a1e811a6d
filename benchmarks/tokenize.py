"""Tokenizers: batches of 2 kB documents beside the libraries sentencepiece and mistral-common, and loading times.

    python -m benchmarks.tokenize [--runs 5] [--megabytes 2] [--without-fast] [--write]

The texts are Python's standard library: its code, and its docstrings as prose; then random letters of all of Unicode.
Both sides make lists of ids, in turn in one process on the same cores: sentencepiece with as many threads as there are.
Ours is loaded with `fast=True`, or with `--without-fast` without it.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mistral_common
import sentencepiece

from mistral_core.text.mistral_common import MistralCommonTokenizer
from mistral_core.text.tokenizer import MistralTokenizer

from .common import keep

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": DATA / "tokenizer.model.v1",
    "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": DATA / "tekken_240718.json",
}
DOCUMENT = 2000
"""Characters."""
LIMITS = {"tokenizer.json": 0.1, "tokenizer.model": 0.3, "mistral --help": 0.2}
"""Seconds."""


def texts(size: int) -> dict[str, str]:
    """Kind -> about `size` characters."""
    code, prose = [], []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(errors="replace")
        code.append(source)
        prose += _docstrings(source)
    rng = random.Random(0)
    planes = [(0x61, 0x7B)] * 3 + [(0xC0, 0x250), (0x391, 0x500), (0x5D0, 0x5EB), (0x904, 0x940), (0x4E00, 0x6000)]
    letters = [[chr(each) for each in range(*plane)] for plane in planes]
    words = ("".join(rng.choices(rng.choice(letters), k=rng.randrange(1, 9))) for _ in range(size // 4))
    found = {"code": "\n".join(code), "prose": "\n\n".join(prose), "unicode": " ".join(words)}
    return {kind: (text * (1 + size // len(text)))[:size] for kind, text in found.items()}


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield doc


def documents(text: str) -> list[str]:
    """A text in documents."""
    return [text[at : at + DOCUMENT] for at in range(0, len(text), DOCUMENT)]


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call took, and what it gave."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def speeds(name: str, kind: str, text: str, runs: int, *, fast: bool) -> str:
    """One row of the table."""
    batch = documents(text)
    megabytes = len(text.encode()) / 1e6
    if name == "tekken":
        theirs = MistralCommonTokenizer(FILES[name])
        peer = lambda: [theirs._inner.encode(each, bos=False, eos=False) for each in batch]  # noqa: E731
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(FILES[name]))
        peer = lambda: model.encode(batch, num_threads=os.cpu_count())  # noqa: E731
    ours = MistralTokenizer.from_pretrained(FILES[name], fast=fast)
    taken: dict[str, list[float]] = {"library": [], "ours": []}
    for _ in range(runs):
        spent, expected = seconds(peer)
        taken["library"].append(spent)
        spent, found = seconds(partial(ours, batch, add_special_tokens=False, return_attention_mask=False))
        taken["ours"].append(spent)
        assert found["input_ids"] == expected, (name, kind)
    library, own = (megabytes / statistics.median(each) for each in taken.values())
    return f"| {name} | {kind} | {library:.1f} | {own:.1f} | {own / library:.2f} |"


def loading(runs: int) -> Iterator[str]:
    """Rows of the table of loading times."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved"
        MistralTokenizer.from_pretrained(FILES["v1"]).save_pretrained(saved)
        model = Path(shutil.copy(FILES["v1"], Path(folder) / "tokenizer.model"))
        for name, path in {
            "tokenizer.json": saved / "tokenizer.json",
            "tokenizer.model": model,
            "tekken.json": FILES["tekken"],
        }.items():
            taken = [
                seconds(lambda path=path: MistralTokenizer.from_pretrained(path).encode("a"))[0] for _ in range(runs)
            ]
            yield _loading_row(name, taken)
    command = [sys.executable, "-m", "mistral_core.cli", "--help"]
    taken = [seconds(lambda: subprocess.run(command, capture_output=True, check=True))[0] for _ in range(runs)]
    yield _loading_row("mistral --help", taken)
    bare = [
        seconds(lambda: subprocess.run([sys.executable, "-c", "import argparse"], check=True))[0] for _ in range(runs)
    ]
    yield _loading_row("python -c 'import argparse'", bare)


def _loading_row(name: str, taken: list[float]) -> str:
    limit = f"{LIMITS[name]:.1f}" if name in LIMITS else ""
    return f"| {name} | {statistics.median(taken):.3f} | {min(taken):.3f} | {limit} |"


def main() -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=2)
    parser.add_argument("--without-fast", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    how = "without fast=True" if options.without_fast else "with fast=True"
    lines = [
        f"Medians of {options.runs} runs, {os.cpu_count()} CPU cores, ids equal, {how}. "
        "Repeat: `python -m benchmarks.tokenize --write`.",
        "",
        "| tokenizer | text | library MB/s | ours MB/s | / library |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, text in texts(int(options.megabytes * 1e6)).items():
        lines += [speeds(name, kind, text, options.runs, fast=not options.without_fast) for name in FILES]
    lines += ["", "| loading | median s | least s | limit s |", "| --- | --- | --- | --- |", *loading(2 * options.runs)]
    report = "\n".join(lines) + "\n"
    print(report)
    if options.write:
        keep("tokenize.md", f"# Tokenizers\n\n{report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
