"""`python tests/convert/fuzz.py [FORMAT ...]`: one byte flipped, cut out or put in at every position of every file.

A small checkpoint of each format must then give the same tensors or an error of ours, within 2 seconds and 256 MB.
Without its manifest numbers may have changed; with it, and `verify="full"`, nothing may.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from samples import bits, ordinary, write

from mistral_core import TINY
from mistral_core.disk.into import MANIFEST
from mistral_core.errors import MistralError
from mistral_core.weights import formats, manifest
from mistral_core.weights.opening import Checkpoint

SMALL = TINY.replace(
    vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ("one bit", "all bits", "cut", "put")
SECONDS = 2.0
STARTING = 30.0
MEMORY = 256 << 20
BOMB = 8 << 30
FORMATS = tuple(name for name, row in formats.FORMATS.items() if row.written)


class Change(NamedTuple):
    """One change of one file."""

    file: Path
    position: int
    kind: str
    verified: bool


def changed(data: bytes, change: Change) -> bytes:
    """The bytes of a file after a change."""
    at, chance = change.position, random.Random(str(change))
    if change.kind == "cut":
        return data[:at] + data[at + 1 :]
    if change.kind == "put":
        return data[:at] + bytes([chance.randrange(256)]) + data[at:]
    mask = 0xFF if change.kind == "all bits" else 1 << chance.randrange(8)
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def changes(directory: Path, stride: int) -> Iterator[Change]:
    """Every change, or one position in `stride` of each file, a different one for each kind."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        for verified in (True, False):
            if file.name == MANIFEST and not verified:
                continue
            for number, kind in enumerate(KINDS):
                for position in range(number * 7 % stride, file.stat().st_size, stride):
                    yield Change(file, position, kind, verified)


def tensors(directory: Path, verified: bool) -> dict[str, bytes]:
    """What a reader gives of a checkpoint."""
    if verified:
        manifest.verify(directory, "full")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config
    return {name: bits(checkpoint.read(name)) for name in checkpoint.tensors}


def attempt(directory: Path, change: Change, expected: dict[str, bytes]) -> str:
    """Empty, or what went wrong after a change, which is undone."""
    data = change.file.read_bytes()
    change.file.write_bytes(changed(data, change))
    hidden = directory.parent / "manifest"
    if not change.verified:
        (directory / MANIFEST).rename(hidden)
    try:
        found = tensors(directory, change.verified)
        return "other tensors" if change.verified and found != expected else ""
    except MistralError:
        return ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        change.file.write_bytes(data)
        if not change.verified:
            hidden.rename(directory / MANIFEST)


def worker(directory: Path, stride: int, first: int) -> None:
    """Make the attempts from one of them on, telling of each in a line."""
    resource.setrlimit(resource.RLIMIT_AS, (BOMB, BOMB))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = tensors(directory, True)
        before = peak()
        for change in list(changes(directory, stride))[first:]:
            wrong = attempt(directory, change, expected)
            if peak() > before + MEMORY:
                wrong, before = f"{peak() - before} bytes of memory", peak()
            print(wrong.replace("\n", " ")[:300], flush=True)


def peak() -> int:
    """The most bytes that this process has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(format: str, *, most: int | None = None) -> tuple[int, list[str]]:
    """How many changes of a format's checkpoint were tried, about `most` if that is given, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(directory, format, ordinary(SMALL), SMALL)
        stride = 1 if most is None else max(1, len(list(changes(directory, 1))) // most)
        todo = list(changes(directory, stride))
        saved = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        wrong: list[str] = []
        done = 0
        while done < len(todo):
            command = [sys.executable, __file__, "--worker", str(directory), str(stride), str(done)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
                for line in lines(child.stdout.fileno()):
                    if line:
                        wrong.append(f"{todo[done]}: {line}")
                    done += 1
                child.kill()
            if done < len(todo):
                wrong.append(f"{todo[done]}: hung or crashed ({child.returncode})")
                done += 1
                restore(directory, saved)
        return len(todo), wrong


def lines(reading: int) -> Iterator[str]:
    """The lines of a pipe, until it ends or is silent for too long; the first one may take a start's time."""
    rest, patience = b"", STARTING
    while select.select([reading], [], [], patience)[0]:
        data = os.read(reading, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in whole)
        patience = SECONDS


def restore(directory: Path, saved: dict[Path, bytes]) -> None:
    """Put every file back after a worker died between a change and its undoing."""
    hidden = directory.parent / "manifest"
    if hidden.exists():
        hidden.rename(directory / MANIFEST)
    for path, data in saved.items():
        path.write_bytes(data)


def main() -> int:
    """Print what went wrong; 0 where nothing did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--most", type=int, help="changes for each format; default: all")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(Path(options.worker[0]), int(options.worker[1]), int(options.worker[2]))
        return 0
    failed = False
    for format in options.formats:
        count, wrong = run(format, most=options.most)
        print(f"{format}: {count} changes, {len(wrong)} wrong", *wrong[:20], sep="\n  ", flush=True)
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
