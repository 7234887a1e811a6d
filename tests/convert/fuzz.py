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
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from samples import bits, ordinary, write

from mistral_core import TINY, MistralConfig
from mistral_core.errors import MistralError
from mistral_core.weights import formats, manifest
from mistral_core.weights.opened import Checkpoint

SMALL = TINY.replace(
    vocab_size=7, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = ("one bit", "all bits", "cut", "put")
SECONDS = 2.0
MEMORY = 256 << 20
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
            if file.name == manifest.NAME and not verified:
                continue
            for number, kind in enumerate(KINDS):
                for position in range(number * 7 % stride, file.stat().st_size, stride):
                    yield Change(file, position, kind, verified)


def tensors(directory: Path, config: MistralConfig, verified: bool) -> dict[str, bytes]:
    """What a reader gives of a checkpoint."""
    if verified:
        manifest.verify(directory, "full")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config
    return {name: bits(checkpoint.read(name)) for name in checkpoint.tensors}


def attempt(directory: Path, config: MistralConfig, change: Change, expected: dict[str, bytes]) -> str:
    """Empty, or what went wrong after a change, which is undone."""
    data = change.file.read_bytes()
    change.file.write_bytes(changed(data, change))
    hidden = directory.parent / "manifest"
    if not change.verified:
        (directory / manifest.NAME).rename(hidden)
    try:
        found = tensors(directory, config, change.verified)
        return "other tensors" if change.verified and found != expected else ""
    except MistralError:
        return ""
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        change.file.write_bytes(data)
        if not change.verified:
            hidden.rename(directory / manifest.NAME)


def worker(pipe: int, directory: Path, config: MistralConfig, todo: list[Change], expected: dict[str, bytes]) -> None:
    """Make the attempts in a process of their own, telling of each in a line."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with warnings.catch_warnings(), os.fdopen(pipe, "w", buffering=1) as out:
        warnings.simplefilter("ignore")
        for change in todo:
            out.write(attempt(directory, config, change, expected).replace("\n", " ")[:300] + "\n")


def run(format: str, *, stride: int = 1, dtype: str = "float32") -> tuple[int, list[str]]:
    """How many changes of a format's checkpoint were tried, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory = Path(folder) / "checkpoint"
        arrays = ordinary(SMALL, dtype)
        write(directory, format, arrays, SMALL)
        expected = tensors(directory, SMALL, True)
        todo = list(changes(directory, stride))
        wrong, done = [], 0
        while done < len(todo):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                worker(writing, directory, SMALL, todo[done:], expected)
                os._exit(0)
            os.close(writing)
            saved = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
            for line in lines(reading):
                if line:
                    wrong.append(f"{todo[done]}: {line}")
                done += 1
            os.kill(child, 9)
            _, status = os.waitpid(child, 0)
            os.close(reading)
            if done < len(todo):
                wrong.append(f"{todo[done]}: hung or crashed (status {status})")
                done += 1
                restore(directory, saved)
        return len(todo), wrong


def lines(reading: int) -> Iterator[str]:
    """The lines of a pipe, until it ends or is silent for too long."""
    rest = b""
    while select.select([reading], [], [], SECONDS)[0]:
        data = os.read(reading, 1 << 16)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from (line.decode() for line in whole)


def restore(directory: Path, saved: dict[Path, bytes]) -> None:
    """Put every file back after a worker died between a change and its undoing."""
    hidden = directory.parent / "manifest"
    if hidden.exists():
        hidden.rename(directory / manifest.NAME)
    for path, data in saved.items():
        path.write_bytes(data)


def main() -> int:
    """Print what went wrong; 0 where nothing did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--stride", type=int, default=1)
    options = parser.parse_args()
    failed = False
    for format in options.formats:
        count, wrong = run(format, stride=options.stride)
        print(f"{format}: {count} changes, {len(wrong)} wrong", *wrong[:20], sep="\n  ", flush=True)
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
