"""A cold `mistral generate`: seconds to its first token, beside importing the framework and reading the bytes.

    python -m benchmarks.first_token [--backend torch,flax,tf] [--repeats 5] [--write]

A checkpoint of size half in bfloat16 with a real tokenizer (from the package mistral-common), made for the run. Each
measurement is a process of its own, in turn: the framework imported and nothing else, the file read into memory
(numpy.fromfile), and the command to its end after one token, of a prompt of a few words. The file is in the page cache:
a disk would hide what the rest costs. Python must be allowed to keep what it compiles (no PYTHONDONTWRITEBYTECODE).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mistral_common

from mistral_core.backend import POLITE
from mistral_core.weights.checkpoint import save

from .common import keep, listed, machine, report, table_row, timed
from .decode import HALF
from .peers.ours import FRAMEWORKS, weights

IMPORTS = {"torch": "import torch", "flax": "import jax; from flax import nnx", "tf": "import tensorflow"}
"""What each backend cannot do without."""
MOST = 1.3
"""The most that the whole may take, as a multiple of importing and reading."""
TOKENIZER = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
PROMPT = "The quick brown fox jumps over"


def checkpoint(folder: Path) -> Path:
    """A checkpoint of random weights in a folder."""
    made = folder / "half"
    save(made, HALF, weights(HALF, "bfloat16"))
    shutil.copy(TOKENIZER, made / "tokenizer.model")
    return made


def seconds(*arguments: str) -> float:
    """How long Python runs with these arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    options = {"env": {**environment, **POLITE}, "check": True, "capture_output": True}
    return timed(lambda: subprocess.run([sys.executable, *arguments], **options))


def measured(made: Path, backend: str) -> tuple[float, float, float]:
    """Seconds of importing, reading and generating."""
    read = "import sys, numpy; held = [numpy.fromfile(path, numpy.uint8) for path in sys.argv[1:]]"
    files = [str(path) for path in sorted(made.glob("*.safetensors"))]
    generate = ("-m", "mistral_core.cli", "generate", str(made), PROMPT, "--backend", backend, "--max-new-tokens", "1")
    return seconds("-c", IMPORTS[backend]), seconds("-c", read, *files), seconds(*generate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    asked = parser.parse_args()
    lines, kept = [], True
    with tempfile.TemporaryDirectory() as folder:
        made = checkpoint(Path(folder))
        for backend in asked.backend:
            rounds = []
            for number in range(asked.repeats + 1):
                report(f"{backend}: round {number} of {asked.repeats}")
                rounds.append(measured(made, backend))
            rounds = rounds[1:]  # the first compiles
            imported, read, whole = (statistics.median(each) for each in zip(*rounds, strict=True))
            ratio = statistics.median(each[2] / (each[0] + each[1]) for each in rounds)
            kept &= ratio <= MOST
            name = f"{backend} ({FRAMEWORKS[backend]} {version(FRAMEWORKS[backend])})"
            lines.append(table_row([name, f"{imported:.2f}", f"{read:.2f}", f"{whole:.2f}", f"{ratio:.2f}"]))
    heads = ["backend", "import s", "read s", "first token s", "of both"]
    page = f"""# The first token of a cold start

`mistral generate` of one token, a checkpoint of size half in bfloat16 (1.1 GB, in the page cache), medians of
{asked.repeats} rounds. {machine()}.
The most is {MOST} of importing and reading. Repeat: `python -m benchmarks.first_token --write`.

{table_row(heads)}
{table_row(["---"] * len(heads))}
{chr(10).join(lines)}
"""
    print(page, end="")
    if asked.write:
        keep("first_token.md", page)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
