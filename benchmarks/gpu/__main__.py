"""All that a GPU is asked, in one run of under nine minutes, as a page.

    make gpu PYTHON=python3                # the repository's root is enough, nothing is installed
    python -m benchmarks.gpu [--size 7b|tiny] [--only conformance,decode] [--minutes 8.8] [--layers 8] [--page FILE]

Parts run in the order of importance, each in a process of its own with a time of its own; one that fails, or for which
no time is left, is named in the page with the reason. Without a GPU all runs at a tiny size, and no page is kept unless
one is named. The Python is one that has PyTorch and JAX; transformers is measured where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, listed, report

from .device import CPU
from .page import page
from .parts import LEAST, SIZES, Outcome, Part, Size, asked_of, parts, run

GROUPS = ("limits", "conformance", "decode", "attention", "packed")


def facts_of(scratch: str) -> dict[str, Any]:
    """What the machine is."""
    found = run(Part("device", "", {}, 60), {}, 60, scratch)
    if not found.rows:
        sys.exit(f"benchmarks.gpu: {found.problem}")
    return found.rows[-1]


def device_of(part: Part, facts: dict[str, Any]) -> str:
    """Where a part runs: each framework has a build of its own, and may see no GPU where the other does."""
    program = part.options.get("program") or part.options.get("backend") or part.options.get("implementation", "torch")
    return facts["jax" if program.partition(" ")[0] in ("flax", "jax") else "torch"]


def outcome_of(part: Part, size: Size, facts: dict[str, Any], left: float, share: float, scratch: str) -> Outcome:
    """A part's results within its limit, or its share of the time where that is more; or why it was left out."""
    device, here = device_of(part, facts), {facts["torch"], facts["jax"]}
    if left < LEAST:
        return Outcome(part, [], "no time was left")
    if device == CPU and here != {CPU}:
        return Outcome(part, [], "its framework sees no GPU")
    limit = min(max(part.limit, share), left)
    report(f"{part.title}, {limit:.0f} s at most, {left:.0f} s left")
    found = run(part, asked_of(part, size, device, limit), limit, scratch)
    report(f"{part.title}: {found.took:.0f} s{', ' + found.problem if found.problem else ''}")
    return found


def size_of(arguments: argparse.Namespace, *, on_gpu: bool) -> Size:
    """The size that is asked for, or that suits the machine."""
    size = SIZES[arguments.size or ("7b" if on_gpu else "tiny")]
    if arguments.layers:
        size = size._replace(config=size.config.replace(num_hidden_layers=arguments.layers))
    return size._replace(batches=tuple(arguments.batch or size.batches))


def measured(arguments: argparse.Namespace, end: float, scratch: str) -> tuple[str, Path | None]:
    """The page, and where it has been kept."""
    facts = facts_of(scratch)
    on_gpu = {facts["torch"], facts["jax"]} != {CPU}
    size, where = size_of(arguments, on_gpu=on_gpu), arguments.page or (RESULTS / "gpu.md" if on_gpu else None)
    chosen = [part for part in parts(size) if part.group in (*arguments.only, "limits")]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    outcomes: list[Outcome] = []
    text = ""
    for number, part in enumerate(chosen):
        left = end - time.perf_counter()
        outcomes.append(outcome_of(part, size, facts, left, left / (len(chosen) - number), scratch))
        text = page(outcomes, size, facts, date=datetime.date.today().isoformat(), command=command)
        if where is not None:  # whatever ends this run, what is known is kept
            where.write_text(text)
        if arguments.logs is not None and outcomes[-1].log:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            (arguments.logs / re.sub(r"\W+", "-", f"{part.title}.txt")).write_text(outcomes[-1].log)
    return text, where


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, help="default: 7b on a GPU, else tiny")
    parser.add_argument("--layers", type=int, help="of the model, in place of all")
    parser.add_argument("--only", type=listed, default=list(GROUPS), metavar="GROUPS", help=f"of {','.join(GROUPS)}")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], help="default: 1,8,32")
    parser.add_argument("--minutes", type=float, default=8.8, help="after which no part is begun and none goes on")
    parser.add_argument("--page", type=Path, help="where the page is kept; on a GPU benchmarks/results/gpu.md")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="where what each part says on stderr is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text, where = measured(arguments, time.perf_counter() + 60 * arguments.minutes, scratch)
    print(text, end="")
    if where is None:
        report("there is no GPU: this tried the kit itself at a tiny size, and keeps no page; --page FILE keeps one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
