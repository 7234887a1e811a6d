"""Two tasks that the embedded checkpoint learns by `mistral train`, in each framework.

    python -m benchmarks.learning classes [--backend torch,flax,tf] [--write]
    python -m benchmarks.learning extraction [--backend torch,flax,tf] [--write]

classes: whether a definition of Webster's dictionary (1913, of Debian's package dict-gcide, which is downloaded) is of
a noun, a verb, an adjective or an adverb. The baseline is a bag of words, by scikit-learn in an environment of its own.

extraction: a sentence is answered by what it says as JSON; answers to sentences that were not learnt must be right to
the letter. The sentences are made here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mistral_core.data import TINY_CHECKPOINT

from .common import ROOT, MeasurementError, keep, listed, machine, measure, report, shown, table_row

BUILD = ROOT / "build" / "learning"
SKLEARN = "scikit-learn==1.7.2"
OF_EACH, HELD_OUT = 1000, 400
"""Definitions of a class that are learnt from, and that are not."""
PARTS = {"n.": "noun", "v. t.": "verb", "v. i.": "verb", "a.": "adjective", "adv.": "adverb"}
"""How the dictionary says what a word is."""
OPTIONS = {
    "classes": ("--epochs", "4", "--rate", "2e-3", "--rows", "32", "--length", "64", "--weight-decay", "0.05"),
    "extraction": ("--epochs", "3", "--rate", "2e-3", "--rows", "4", "--length", "256", "--template", "v1"),
}
WHO = (
    "Emma", "Harriet", "Jane", "Frank", "Isabella", "Robert", "Philip", "Augusta", "George", "Henry", "Anne", "Mary",
    "Charlotte", "Lydia", "Louisa", "Walter", "Edmund", "Fanny", "Marianne", "Edward",
)  # fmt: skip
WHERE = (
    "Highbury", "London", "Hartfield", "Randalls", "Bath", "Weymouth", "Richmond", "Brighton", "Donwell", "Kingston",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SENTENCES = (
    "{who} met {whom} at {where} on {day}.",
    "On {day}, {who} wrote to {whom} from {where}.",
    "{whom} was seen by {who} in {where} last {day}.",
    "At {where}, {day} was the day when {who} danced with {whom}.",
)
LEARNT, ASKED = 2000, 200
"""Sentences."""


def definitions() -> Iterator[tuple[str, str]]:
    """The first definition of each word of the dictionary, and what the word is, in the order of the letters."""
    BUILD.mkdir(parents=True, exist_ok=True)
    if not list(BUILD.glob("dict-gcide*.deb")):
        report("downloading Debian's package dict-gcide")
        subprocess.run(["apt-get", "download", "dict-gcide"], cwd=BUILD, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", next(BUILD.glob("dict-gcide*.deb")), scratch], check=True)
        data = (Path(scratch) / "usr/share/dictd/gcide.dict.dz").read_bytes()
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", gzip.decompress(data).decode(errors="replace")):
        head = re.match(
            r"^(.+?) \\[^\\]*\\[^,\n]{0,40}, (n\.|v\. t\.|v\. i\.|a\.|adv\.)(?=[ \n;])(.*)", entry, re.DOTALL
        )
        if head and "[1913 Webster]" in entry and (text := _first_sentence(head[3].split("[1913 Webster]")[0])):
            found.setdefault(text, PARTS[head[2]])
    yield from sorted(found.items())


def _first_sentence(body: str) -> str | None:
    """A definition without where its word comes from and who used it."""
    while (shorter := re.sub(r"\[[^\[\]]*\]", " ", body)) != body:
        body = shorter
    body = re.sub(r"\([A-Z][a-z]*\.?\)|--\s*[A-Z].*|[{}]", " ", body, flags=re.DOTALL)
    body = re.sub(r"^[;,.\s]*(?:pl\.[^.]*\.)?\s*(?:\d+\.|\([a-z]\))\s*", "", " ".join(body.split()))
    sentence = re.match(r"[A-Z][^.;]{14,160}(?=[.;])", re.sub(r"^[^A-Za-z]*", "", body))
    return sentence[0].strip() if sentence and sentence[0].isascii() else None


def classes() -> tuple[list[Any], list[Any]]:
    """Examples to learn from and others, as many of each class."""
    order, every = random.Random(0), list(definitions())
    order.shuffle(every)
    learnt, others = [], []
    for kind in sorted(set(PARTS.values())):
        rows = [{"text": text, "label": label} for text, label in every if label == kind]
        others += rows[:HELD_OUT]
        learnt += rows[HELD_OUT : HELD_OUT + OF_EACH]
    order.shuffle(learnt)
    return learnt, others


def extraction() -> tuple[list[Any], list[Any]]:
    """Conversations to learn from and others: no sentence twice."""
    order, found = random.Random(0), {}
    while len(found) < LEARNT + ASKED:
        who, whom = order.sample(WHO, 2)
        said = {"who": who, "whom": whom, "where": order.choice(WHERE), "day": order.choice(DAYS)}
        found.setdefault(order.choice(SENTENCES).format(**said), json.dumps(said))
    chats = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in found.items()
    ]
    return chats[:LEARNT], chats[LEARNT:]


def written(name: str, rows: list[Any]) -> Path:
    """A .jsonl in the build directory."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(task: str, backend: str, learnt: Path, others: Path, out: Path) -> tuple[list[dict[str, Any]], float]:
    """The metrics of a run, and its seconds."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "mistral_core.cli", "train", str(TINY_CHECKPOINT), str(learnt), "--out", str(out)]
    more = ["--validation", str(others), "--dtype", "float32", "--backend", backend, *OPTIONS[task]]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise MeasurementError(f"mistral train: exit {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], time.perf_counter() - begun


def bag_of_words(learnt: Path, others: Path) -> dict[str, Any]:
    """What scikit-learn's best of two bags of words and five regularisations gets right."""
    folder = BUILD / "scikit-learn"
    python = folder / "bin" / "python"
    if not python.exists():
        report("installing scikit-learn into an environment of its own")
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", SKLEARN], check=True)
    return measure(
        "bag_of_words", {"learnt": str(learnt), "others": str(others)}, python=str(python), scratch=str(BUILD)
    )


def measured(task: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """The columns of a task's table, and its rows."""
    make = {"classes": classes, "extraction": extraction}[task]
    learnt, others = (written(f"{task}-{name}", rows) for name, rows in zip(("train", "test"), make(), strict=True))
    rows = []
    if task == "classes":
        columns = ["what", "right", "validation loss", "seconds"]
        begun, found = time.perf_counter(), bag_of_words(learnt, others)
        seconds = time.perf_counter() - begun
        rows.append([f"bag of words ({found['best']}), {SKLEARN}", f"{found['right']:.1%}", "", shown(seconds)])
    else:
        columns = ["what", "right before", "right", "validation loss", "seconds"]
    for name in names:
        report(f"{task} in {name}")
        with tempfile.TemporaryDirectory() as scratch:
            metrics, seconds = trained(task, name, learnt, others, Path(scratch) / "run")
            last = [line for line in metrics if "validation_loss" in line][-1]
            told = [json.loads((Path(scratch) / "run" / "run.json").read_text())["made_with"]["backend"]]
            if task == "classes":
                told.append(f"{last['validation_right']:.1%}")
            else:
                asked = {"backend": name, "rows": str(others)}
                for path in (TINY_CHECKPOINT, Path(scratch) / "run" / "final"):
                    found = measure("exact_match", {**asked, "path": str(path)}, scratch=scratch)
                    told.append(f"{found['right']:.1%}")
            rows.append([*told, f"{last['validation_loss']:.4f}", shown(seconds)])
    return columns, rows


def main() -> int:
    """Measure a task, and print its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(OPTIONS))
    parser.add_argument("--backend", type=listed, default=["torch", "flax", "tf"])
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    options = parser.parse_args()
    columns, rows = measured(options.task, options.backend)
    what = {
        "classes": f"Noun, verb, adjective or adverb, by a definition: {4 * OF_EACH} learnt, {4 * HELD_OUT} others "
        "asked, as many of each class.",
        "extraction": f"A sentence is answered by what it says as JSON: {LEARNT} learnt, {ASKED} others asked, each "
        "right if it is to the letter.",
    }[options.task]
    table = "\n".join(map(table_row, [columns, ["---"] * len(columns), *rows]))
    text = (
        f"# Learning: {options.task}\n\n{what}\nThe embedded checkpoint, all weights, float32: `mistral train` with "
        f"{' '.join(OPTIONS[options.task])}.\n{machine()}. Repeat: `python -m benchmarks.learning "
        f"{options.task} --write`.\n\n{table}\n"
    )
    print(text, end="")
    if options.write:
        keep(f"learning_{options.task}.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
