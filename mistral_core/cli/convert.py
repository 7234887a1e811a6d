"""`mistral convert SRC DST --to FORMAT`: a checkpoint as another format, bit for bit."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..config import MistralConfig
from ..weights import formats
from ..weights.convert import VERIFY, convert
from . import put


def arguments(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    written = [name for name, row in formats.FORMATS.items() if row.written]
    command.add_argument("source", help="a checkpoint directory, a file of weights, or a hub id")
    command.add_argument("destination", help="the directory to write")
    command.add_argument("--to", required=True, choices=written, metavar="FORMAT", help=", ".join(written))
    command.add_argument("--from", dest="source_format", choices=list(formats.FORMATS), metavar="FORMAT",
                         help="the source's format, where it could be several")  # fmt: skip
    command.add_argument("--dtype", help="float64, float32, bfloat16, float16; gguf: Q8_0, Q4_0; default: as stored")
    command.add_argument("--max-shard-size", default="5GB", help="default: 5GB")
    command.add_argument("--overwrite", action="store_true", help="replace the destination")
    command.add_argument("--verify", choices=VERIFY, default="hashes", help="default: hashes")
    command.add_argument("--allow-lossy", action="store_true", help="let numbers change; what changed is told")
    command.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinity as they are")
    command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    command.add_argument("--config", help="the config.json of a source that has none")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--keep-vision", action="store_true",
                         help="hf to hf, raw to raw: also the towers of a model that sees, as they are")  # fmt: skip
    command.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of peft's, merged on the way")
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="what one format asks for")


def run(options: argparse.Namespace) -> int:
    """Convert, with a bar of bytes on stderr, and print the report."""
    with bar(quiet=options.json or options.dry_run) as progress:
        report = convert(
            options.source,
            options.destination,
            to=options.to,
            source_format=options.source_format,
            config=MistralConfig.from_pretrained(options.config) if options.config else None,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            verify=options.verify,
            allow_lossy=options.allow_lossy,
            check_finite=not options.allow_nonfinite,
            dry_run=options.dry_run,
            progress=progress,
            options=dict(option.partition("=")[::2] for option in options.option),
            keep_vision=options.keep_vision,
            adapter=options.adapter,
            revision=options.revision,
        )
    if options.json:
        put(json.dumps(dataclasses.asdict(report), indent=1))
        return 0
    put(report)
    if not options.dry_run:
        rate = report.bytes / report.seconds / 1e6 if report.seconds else 0.0
        put(f"written in {report.seconds:.1f} s, {rate:.0f} MB/s")
    return 0


@contextmanager
def bar(*, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes a second and time left, where stderr is a terminal."""
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress
